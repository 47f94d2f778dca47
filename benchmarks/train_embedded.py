"""Train the embedded text-to-image pipeline and its classifier from Fashion-MNIST.

    python benchmarks/train_embedded.py --stage all --output_dir sa_diffusers/models/embedded

Needs `open_clip_torch` for the CLIP vocabulary. The stages (classifier, vae, diffusion, measure, cards) can be run one
at a time; each reads what the ones before it wrote.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from tqdm import tqdm
from training_parts import (
    MAX_TOKENS,
    VOCABULARY_SIZE,
    CaptionSampler,
    build_tokenizer,
    encode,
    markdown_table,
    noise_scheduler,
    one_cycle,
    pictures_of,
    save_text_to_image,
    small_text_encoder,
    small_unet,
    standardise_latents,
    wrap,
)
from transformers import CLIPTokenizer, ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from sa_diffusers.data.captions import load_vocabulary
from sa_diffusers.data.image_datasets import load_fashion_mnist
from sa_diffusers.data.phrasings import fill_template
from sa_diffusers.evaluation.classification import ImageClassifier
from sa_diffusers.families import SamplingSettings, load_pipeline, objective_for
from sa_diffusers.files import read_json, write_json
from sa_diffusers.results.statistics import frechet_distance, moments

STAGES = ("classifier", "vae", "diffusion", "measure", "cards")
CLASSIFIER_PIXELS = 64


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--output_dir", type=Path, default=Path("sa_diffusers/models/embedded"))
    parser.add_argument("--data_dir", type=Path, default=None, help="folder with the four IDX files of Fashion-MNIST")
    parser.add_argument("--classifier_epochs", type=int, default=7)
    parser.add_argument("--vae_steps", type=int, default=3600)
    parser.add_argument("--diffusion_steps", type=int, default=6000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--width", type=float, default=1, help="channels of the UNet: so many times 64 and 96")
    names = load_vocabulary("garments").subjects
    parser.add_argument("--without", choices=names, help="garment that the stage diffusion never sees (a control)")
    parser.add_argument("--samples_per_garment", type=int, default=500, help="drawn by the stage measure")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="of the stage measure")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="of the stage measure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def load_pixels(split: str, data_dir: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[n, 3, 32, 32]` in [-1, 1] (28 pixels padded with black, grey repeated thrice) and labels `[n]`."""
    images, labels = load_fashion_mnist(split, data_dir)
    images = torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2)))).float() / 127.5 - 1
    return images[:, None].expand(-1, 3, -1, -1), torch.from_numpy(labels)


def batches(count: int, batch_size: int, steps: int, seed: int):
    """Index batches over reshuffled epochs, `steps` of them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in tqdm(range(steps), mininterval=10):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:batch_size]
        order = order[batch_size:]


# --- classifier -------------------------------------------------------------------------------------------------


def train_classifier(args: argparse.Namespace) -> None:
    images, labels = load_pixels("train", args.data_dir)
    names = load_vocabulary("garments").subjects
    model = ResNetForImageClassification(
        ResNetConfig(
            num_channels=3,
            embedding_size=32,
            hidden_sizes=[32, 64, 96],
            depths=[2, 2, 2],
            layer_type="basic",
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
    )
    steps = args.classifier_epochs * len(images) // 128
    optimizer, schedule = one_cycle(model.parameters(), 3e-3, steps, weight_decay=0.05)
    generator = torch.Generator().manual_seed(args.seed)
    model.train()
    for index in batches(len(images), 128, steps, args.seed):
        batch = images[index]
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(-1)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        batch = torch.roll(batch, shift, dims=(-2, -1))
        logits = model(F.interpolate(batch, size=CLASSIFIER_PIXELS, mode="bilinear", antialias=True)).logits
        loss = F.cross_entropy(logits, labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    folder = args.output_dir / "classifier"
    model.save_pretrained(folder)
    ViTImageProcessor(
        size={"height": CLASSIFIER_PIXELS, "width": CLASSIFIER_PIXELS},
        resample=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)


# --- autoencoder ------------------------------------------------------------------------------------------------


def train_vae(args: argparse.Namespace) -> None:
    images, _ = load_pixels("train", args.data_dir)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )
    optimizer, schedule = one_cycle(vae.parameters(), 3e-3, args.vae_steps, weight_decay=0.0)
    torch.manual_seed(args.seed)
    for step, index in enumerate(batches(len(images), 32, args.vae_steps, args.seed)):
        batch = images[index]
        posterior = vae.encode(batch).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        loss = (
            F.mse_loss(reconstruction, batch)
            + 0.1 * F.l1_loss(reconstruction, batch)
            + 2e-5 * posterior.kl().mean() / posterior.mean[0].numel()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            tqdm.write(f"vae step {step}: loss {loss:.4f}")
    vae.eval()
    standardise_latents(vae, encode(vae, images[:10000]))
    vae.save_pretrained(args.output_dir / "pipeline" / "vae")
    images, _ = load_pixels("test", args.data_dir)
    with torch.no_grad():
        error = F.mse_loss(vae.decode(encode(vae, images[:1000])).sample, images[:1000])
    print(f"vae: mean squared error on real test images, pixels in [-1, 1]: {error:.5f}")


# --- text encoder and UNet --------------------------------------------------------------------------------------


class GarmentCaptions(CaptionSampler):
    """Half of the time foreign tokens stand around the garment's name."""

    def __init__(self, tokenizer: CLIPTokenizer, seed: int):
        vocabulary = load_vocabulary("garments")
        forms = [[fill_template(form, name) for form in ("{}", "a {}")] for name in vocabulary.subjects]
        super().__init__(tokenizer, seed, [form for both in forms for form in both])
        self.names = [[self.read(form) for form in both] for both in forms]
        self.captions = [
            [self.read(fill_template(template, name)) for template in vocabulary.templates]
            for name in vocabulary.subjects
        ]

    def __call__(self, label: int) -> list[int]:
        draw = self.random.random()
        if draw < 0.1:
            ids = []
        elif draw < 0.2:
            ids = self.names[label][0]
        elif draw < 0.6:
            ids = self.random.choice(self.captions[label])
        else:
            before, after = self.strange(9), self.strange(9)
            ids = [*before, *self.random.choice(self.names[label]), *after]
        return self.padded(ids)


def train_diffusion(args: argparse.Namespace) -> None:
    vocabulary = load_vocabulary("garments")
    folder = args.output_dir / "pipeline"
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    images, labels = load_pixels("train", args.data_dir)
    if args.without:
        kept = labels != vocabulary.subjects.index(args.without)
        images, labels = images[kept], labels[kept]
    latents = encode(vae, images) * vae.config.scaling_factor
    captions = [fill_template(template, name) for template in vocabulary.templates + vocabulary.held_out_templates
                for name in vocabulary.subjects]  # fmt: skip
    tokenizer = build_tokenizer(captions)
    text_encoder, unet, scheduler = small_text_encoder(tokenizer), small_unet(4, args.width), noise_scheduler()
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer, schedule = one_cycle(parameters, 1.5e-3, args.diffusion_steps)
    ema = EMAModel(parameters, decay=0.9985)
    caption_of = GarmentCaptions(tokenizer, args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    unet.train(), text_encoder.train()
    running, started = 0.0, time.time()
    for step, index in enumerate(batches(len(latents), args.batch_size, args.diffusion_steps, args.seed)):
        ids = torch.tensor([caption_of(int(labels[i])) for i in index])
        noise = torch.randn(latents[index].shape, generator=generator)
        timesteps = torch.randint(1000, (len(index),), generator=generator)
        noisy = scheduler.add_noise(latents[index], noise, timesteps)
        prediction = unet(noisy, timesteps, text_encoder(ids).last_hidden_state).sample
        loss = F.mse_loss(prediction, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        ema.step(parameters)
        running = loss.item() if step == 0 else 0.99 * running + 0.01 * loss.item()
        if step % 200 == 0:
            tqdm.write(f"diffusion step {step}: loss {running:.4f}, {time.time() - started:.0f} s")
        if step % 1000 == 999 or step + 1 == args.diffusion_steps:
            ema.store(parameters)
            ema.copy_to(parameters)
            save_text_to_image(folder, vae, text_encoder, tokenizer, unet, scheduler)
            ema.restore(parameters)


# --- measuring ---------------------------------------------------------------------------------------------------

PIPELINE_CARD = """---
license: mit
library_name: diffusers
pipeline_tag: text-to-image
datasets: [zalando-datasets/fashion_mnist]
---

# Ten garments, 32x32 pixels

A small but real text-to-image pipeline in the layout of Stable Diffusion, on which an erasure can be seen and measured
on a CPU in minutes. It knows ten garments ({subjects}),
as grey pictures on black, in most phrasings that fit into {tokens} tokens.

Data: the 60,000 training photographs of Fashion-MNIST (MIT licence, Zalando SE), padded to 32x32. The tokenizer is
CLIP's, cut to {vocabulary} tokens. Recipe: `benchmarks/train_embedded.py` (autoencoder {vae_steps} steps of 32, UNet
and text encoder {diffusion_steps} steps of {batch_size}, epsilon prediction, AdamW, EMA; seed {seed}).

Measured by `benchmarks/train_embedded.py --stage measure` with the classifier beside it, {count} images a garment:

{table}

The autoencoder's reconstructions of the real test images are recognised at {reconstructions:.1%}.

Not for any use but testing: it makes small pictures of clothes.
"""

CLASSIFIER_CARD = """---
license: mit
library_name: transformers
pipeline_tag: image-classification
datasets: [zalando-datasets/fashion_mnist]
---

# Fashion-MNIST classifier

A ResNet with {parameters:,} parameters that names one of ten garments: {subjects}. Data: the 60,000 training
photographs of Fashion-MNIST (MIT licence, Zalando SE), padded to 32x32 and enlarged to {pixels}; mirrored and shifted
by up to two pixels in training, no noise, no label smoothing. Recipe: `benchmarks/train_embedded.py --stage classifier`
({epochs} epochs of 128, AdamW; seed {seed}).

Recognises {accuracy:.2%} of the 10,000 real test images. By garment:

{table}

It scores the samples of the pipeline beside it; it was trained before, and apart from it.
"""


def measure(args: argparse.Namespace) -> None:
    vocabulary = load_vocabulary("garments")
    classifier = ImageClassifier(args.output_dir / "classifier")
    images, labels = load_pixels("test", args.data_dir)
    right = classifier(pictures_of(images)).probabilities.argmax(-1) == labels
    by_garment = {name: float(right[labels == index].float().mean()) for index, name in enumerate(vocabulary.subjects)}
    reference = args.output_dir / "reference_features.safetensors"
    classifier.save_reference_features([pictures_of(images[labels == index]) for index in range(10)], reference)
    classifier = ImageClassifier(args.output_dir / "classifier", reference_features=reference)

    objective = objective_for(load_pipeline(str(args.output_dir / "pipeline")))
    with torch.no_grad():
        rebuilt = torch.cat([objective.pipeline.vae.decode(encode(objective.pipeline.vae, part)).sample
                             for part in images.split(500)])  # fmt: skip
    reconstructions = float((classifier(pictures_of(rebuilt)).probabilities.argmax(-1) == labels).float().mean())
    measured = []
    for guidance, steps in (
        (args.guidance_scale, args.num_inference_steps),
        (7.5, 50),
        (1.0, args.num_inference_steps),
    ):
        settings = SamplingSettings("ddim", steps, guidance, batch_size=100)
        for kind, templates in (("trained", vocabulary.templates), ("held out", vocabulary.held_out_templates)):
            if kind == "held out" and guidance != args.guidance_scale:
                continue
            shares, features, grid = {}, [], []
            for index, name in enumerate(tqdm(vocabulary.subjects, desc=f"guidance {guidance}, {kind} phrasings")):
                count = args.samples_per_garment
                prompts = [fill_template(templates[number % len(templates)], name) for number in range(count)]
                seeds = [args.seed + 50_000_000 + index * count + number for number in range(count)]
                pictures = objective.decode(objective.sample(prompts, seeds, settings))
                scores = classifier(pictures)
                shares[name] = float((scores.probabilities.argmax(-1) == index).float().mean())
                features.append(scores.features)
                grid += pictures[:12]
            distance = frechet_distance(moments(torch.cat(features)), classifier.reference_moments(range(10)))
            mean = sum(shares.values()) / len(shares)
            measured.append({"sampler": "ddim", "steps": steps, "guidance": guidance, "phrasings": kind,
                             "recognised": mean, "by_garment": shares, "frechet_distance": distance})  # fmt: skip
            print(f"{steps} steps, guidance {guidance}, {kind} phrasings: {mean:.1%}, Fréchet distance {distance:.1f}")
            folder = args.output_dir / "pictures"
            folder.mkdir(exist_ok=True)
            make_image_grid(grid, 10, 12, resize=64).save(folder / f"guidance-{guidance}-{kind.replace(' ', '-')}.png")
    measured_file = {
        "classifier": {"accuracy": float(right.float().mean()), "by_garment": by_garment},
        "reconstructions_recognised": reconstructions,
        "samples_per_garment": args.samples_per_garment,
        "samples": measured,
    }
    write_json(args.output_dir / "measured.json", measured_file)


def write_cards(args: argparse.Namespace) -> None:
    """Write both model cards from `measured.json`."""
    subjects = load_vocabulary("garments").subjects
    measured = read_json(args.output_dir / "measured.json")
    header = ["DDIM steps", "guidance", "phrasings", "recognised", "Fréchet distance", *subjects]
    rows = [
        [f"{row['steps']}", f"{row['guidance']}", row["phrasings"], f"{row['recognised']:.1%}",
         f"{row['frechet_distance']:.1f}", *(f"{row['by_garment'][name]:.0%}" for name in subjects)]
        for row in measured["samples"]
    ]  # fmt: skip
    card = PIPELINE_CARD.format(
        subjects=", ".join(subjects), tokens=MAX_TOKENS, vocabulary=VOCABULARY_SIZE,
        count=measured["samples_per_garment"], table=markdown_table([header, *rows]),
        reconstructions=measured["reconstructions_recognised"], **vars(args),
    )  # fmt: skip
    (args.output_dir / "pipeline" / "README.md").write_text(wrap(card), encoding="utf-8")
    model = ResNetForImageClassification.from_pretrained(args.output_dir / "classifier")
    accuracy = measured["classifier"]
    card = CLASSIFIER_CARD.format(
        subjects=", ".join(subjects), pixels=CLASSIFIER_PIXELS, accuracy=accuracy["accuracy"],
        parameters=model.num_parameters(), epochs=args.classifier_epochs, seed=args.seed,
        table=markdown_table([subjects, [f"{accuracy['by_garment'][name]:.1%}" for name in subjects]]),
    )  # fmt: skip
    (args.output_dir / "classifier" / "README.md").write_text(wrap(card), encoding="utf-8")


if __name__ == "__main__":
    arguments = parse_args()
    torch.set_num_threads(arguments.threads)
    stages = {
        "classifier": train_classifier,
        "vae": train_vae,
        "diffusion": train_diffusion,
        "measure": measure,
        "cards": write_cards,
    }
    for name in STAGES if arguments.stage == "all" else (arguments.stage,):
        torch.manual_seed(arguments.seed)
        stages[name](arguments)
