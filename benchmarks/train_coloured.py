"""Train the coloured text-to-image pipeline and its judges from sets of icons.

    npm install --prefix outputs/coloured @iconify-json/noto @iconify-json/noto-v1 @iconify-json/fluent-emoji \\
        emojibase-data @resvg/resvg-js
    python benchmarks/train_coloured.py --stage all --output_dir sa_diffusers/models/coloured

Needs node, and `open_clip_torch` for the CLIP vocabulary. The stages (render, judges, vae, diffusion, measure, cards)
can be run one at a time; each reads what the ones before it wrote, from `--work_dir` and `--output_dir`. The stages vae
and diffusion keep their state in `--work_dir` every few minutes: the same command goes on where it was stopped, and one
with more steps stretches the schedule of the learning rate and goes on from there. Without that state the diffusion
begins at the pipeline of `--output_dir` when `--from_pipeline` says so.
"""

import argparse
import json
import random
import subprocess
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from safetensors.torch import load_file, save_file
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
from training_parts.icons import CONCEPTS, PIXELS, RENDERED_PIXELS, STYLES, backgrounds, variations
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

from sa_diffusers.data.captions import load_vocabulary
from sa_diffusers.data.phrasings import fill_template
from sa_diffusers.evaluation.classification import ImageClassifier
from sa_diffusers.families import SamplingSettings, load_pipeline, objective_for
from sa_diffusers.files import read_json, write_json
from sa_diffusers.results.statistics import frechet_distance, moments

STAGES = ("render", "judges", "vae", "diffusion", "measure", "cards")
NAMES = [concept.name for concept in CONCEPTS]
STYLE_NAMES = [style.name for style in STYLES]
NEITHER = "neither"
LANGUAGES = ("de", "es", "fr")
LATENT_CHANNELS = 16


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--output_dir", type=Path, default=Path("sa_diffusers/models/coloured"))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/coloured"), help="icons and states of training")
    parser.add_argument("--packages", type=Path, help="where npm installed the icons; default: --work_dir")
    parser.add_argument("--judge_steps", type=int, default=450)
    parser.add_argument("--vae_steps", type=int, default=4600)
    parser.add_argument("--diffusion_steps", type=int, default=9000)
    parser.add_argument("--batch_size", type=int, default=64, help="of the stage diffusion")
    parser.add_argument("--variations", type=int, default=160, help="of each drawing, for the stage diffusion")
    parser.add_argument("--save_seconds", type=float, default=240, help="between two states kept")
    parser.add_argument("--from_pipeline", action="store_true", help="the stage diffusion begins at --output_dir's")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 in training")
    parser.add_argument("--samples_per_concept", type=int, default=24, help="drawn by the stage measure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.samples_per_concept < 4 * len(STYLES):
        parser.error(
            f"--samples_per_concept {args.samples_per_concept} is too few: give {4 * len(STYLES)} or more, for every "
            "style has its share of the row with the fewest"
        )
    return args


def precision(args: argparse.Namespace):
    """Autocast to bfloat16, in which processors that know it train a third faster; weights stay float32."""
    return nullcontext() if args.float32 else torch.autocast("cpu", torch.bfloat16)


def seeded(args: argparse.Namespace, *path: int) -> torch.Generator:
    """A generator of its own for each step of a stage, so that a training that goes on draws what it would have."""
    seed = np.random.SeedSequence([args.seed, *path]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


class TrainingState:
    """What a training needs to go on: weights, averages, moments of the optimiser, and the step it is at.

    Args:
        folder: Where it is kept.
        parameters: All that is trained.
        optimizer: AdamW.
        average: A moving average of the parameters, if there is one.
        seconds: Between two states kept.
    """

    def __init__(self, folder: Path, parameters, optimizer, average: EMAModel | None, seconds: float):
        self.folder, self.parameters, self.optimizer, self.average = folder, parameters, optimizer, average
        self.seconds, self.kept, self.trained = seconds, time.time(), 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def load(self) -> int:
        """The number of steps done; what they made is put in place."""
        if not (self.folder / "state.json").is_file():
            return 0
        state = read_json(self.folder / "state.json")
        tensors = load_file(self.folder / state["tensors"])
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"parameter.{index}"])
                self.optimizer.state[parameter] = {
                    key: tensors[f"{key}.{index}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
                }
                if self.average is not None:
                    self.average.shadow_params[index].copy_(tensors[f"average.{index}"])
        if self.average is not None:
            self.average.optimization_step = state["steps"]
        self.trained = state["seconds"]
        return state["steps"]

    def due(self) -> bool:
        return time.time() - self.kept > self.seconds

    def save(self, steps: int) -> None:
        """Tensors go to one of two files by turns, so that a stop at any time leaves a whole state."""
        now = time.time()
        self.trained, self.kept = self.trained + now - self.kept, now
        tensors = {}
        for index, parameter in enumerate(self.parameters):
            tensors[f"parameter.{index}"] = parameter.detach()
            tensors |= {f"{key}.{index}": value for key, value in self.optimizer.state[parameter].items()}
            if self.average is not None:
                tensors[f"average.{index}"] = self.average.shadow_params[index]
        before = self.folder / "state.json"
        used = read_json(before)["tensors"] if before.is_file() else None
        name = "b.safetensors" if used == "a.safetensors" else "a.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self.folder / name)
        write_json(before, {"steps": steps, "tensors": name, "seconds": self.trained})


def resume(schedule: torch.optim.lr_scheduler.OneCycleLR, steps: int) -> None:
    """Take a fresh schedule to where it is after so many steps."""
    if steps:
        schedule.last_epoch = steps - 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a schedule whose optimiser has made no step yet
            schedule.step()


# --- rendering ---------------------------------------------------------------------------------------------------


def render(args: argparse.Namespace) -> None:
    """Write `icons.safetensors` (`[concepts, styles, 4, h, h]`) and `names.json` (other languages' names)."""
    packages = args.packages or args.work_dir
    drawings = torch.stack([render_set(args, packages, style.package) for style in STYLES], 1)
    save_file({"icons": drawings}, args.work_dir / "icons.safetensors")
    names = {concept.name: [] for concept in CONCEPTS}
    for language in LANGUAGES:
        path = packages / "node_modules" / "emojibase-data" / language / "compact.json"
        by_code = {entry["hexcode"]: entry["label"] for entry in json.loads(path.read_text(encoding="utf-8"))}
        for concept in CONCEPTS:
            names[concept.name].append(by_code[concept.code].lower())
    write_json(args.work_dir / "names.json", names)
    generator = seeded(args, 0)
    pictures = pictures_of(variations(drawings.flatten(0, 1).to(torch.float32) / 255, generator))
    make_image_grid(pictures, 8, len(pictures) // 8).save(args.work_dir / "icons.png")


def render_set(args: argparse.Namespace, packages: Path, package: str) -> torch.Tensor:
    """All concepts of a set, `[concepts, 4, h, h]` of bytes, colours multiplied by alpha."""
    folder = args.work_dir / "rendered" / package
    folder.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("render_icons.mjs")
    icons = [concept.icon for concept in CONCEPTS]
    command = ["node", str(script), str(packages), package, str(RENDERED_PIXELS), str(folder), *icons]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        place = len(process.stdout.split())
        raise SystemExit(
            f"{package}: rendering stopped at the icon {icons[place]} ({process.stderr.strip()[-300:]}): choose "
            "another icon in benchmarks/training_parts/icons.py, or run `npm install` as the head of this script says"
        )
    pixels = np.stack([np.fromfile(folder / f"{icon}.rgba", np.uint8) for icon in icons])
    pixels = pixels.reshape(-1, RENDERED_PIXELS, RENDERED_PIXELS, 4)
    # The renderer gives colours multiplied by alpha: turning mixes in nothing of what is transparent.
    assert (pixels[..., :3] <= pixels[..., 3:]).all()
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def load_icons(args: argparse.Namespace) -> torch.Tensor:
    """`[concepts * styles, 4, h, h]` in [0, 1]; the drawing of concept c in style s is at `c * styles + s`."""
    return load_file(args.work_dir / "icons.safetensors")["icons"].flatten(0, 1).float() / 255


def draw(icons: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of random drawings, and which they show."""
    shown = torch.randint(len(icons), (count,), generator=generator)
    return variations(icons[shown], generator), shown


# --- judges ------------------------------------------------------------------------------------------------------


def make_garbage(args: argparse.Namespace, icons: torch.Tensor) -> torch.Tensor:
    """What an autoencoder makes of pictures, and of noise, when its training has just begun: `[n, 3, h, h]`."""
    path = args.work_dir / "garbage.safetensors"
    if path.is_file():
        return load_file(path)["pictures"].float() / 127.5 - 1
    vae = small_autoencoder()
    optimizer, schedule = one_cycle(vae.parameters(), 2e-3, 100, weight_decay=0.0)
    kept = []
    for step in range(100):
        pictures, _ = draw(icons, 16, seeded(args, 1, step))
        latents = vae.encode(pictures).latent_dist.mean
        rebuilt = vae.decode(latents).sample
        optimizer.zero_grad()
        F.mse_loss(rebuilt, pictures).backward()
        optimizer.step()
        schedule.step()
        if step < 50:
            kept.append(rebuilt.detach())
        elif step >= 60:
            with torch.no_grad():
                noise = torch.randn(latents.shape, generator=seeded(args, 2, step))
                kept.append(vae.decode(noise * latents.std((0, 2, 3), keepdim=True)).sample)
    pictures = ((torch.cat(kept).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    save_file({"pictures": pictures}, path)
    return pictures.float() / 127.5 - 1


def neither(icons: torch.Tensor, garbage: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Pictures of nothing in particular: noise, empty paper, two drawings over each other or cut together, scattered
    patches, and garbage."""
    first, shown = draw(icons, count, generator)
    styles = len(STYLES)
    # Another concept in another style.
    others = (shown // styles + torch.randint(1, len(CONCEPTS), (count,), generator=generator)) % len(CONCEPTS)
    others = others * styles + (shown + torch.randint(1, styles, (count,), generator=generator)) % styles
    second = variations(icons[others], generator)
    share = 0.35 + 0.3 * torch.rand(count, 1, 1, 1, generator=generator)
    left = torch.arange(PIXELS) < PIXELS // 2
    patches = first.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)
    order = torch.rand(count, 64, generator=generator).argsort(-1)
    patches = patches.gather(2, order[:, None, :, None, None].expand(-1, 3, -1, 8, 8))
    patches = patches.unflatten(2, (8, 8)).permute(0, 1, 2, 4, 3, 5).reshape(first.shape)
    paper = (backgrounds(count, generator) * 2 - 1)[:, :, None, None].expand_as(first)
    grain = torch.randn(first.shape, generator=generator)
    amount = torch.rand(count, 1, 1, 1, generator=generator)
    kinds = torch.stack(
        [
            share * first + (1 - share) * second,
            torch.where(left, first, second),
            torch.where(left[:, None], first, second),
            patches,
            paper + 0.1 * amount * grain,
            amount * grain,
            F.interpolate(grain[:, :, ::8, ::8], size=PIXELS, mode="bilinear") * amount,
            garbage[torch.randint(len(garbage), (count,), generator=generator)],
            garbage[torch.randint(len(garbage), (count,), generator=generator)],
        ]
    )
    chosen = torch.randint(len(kinds), (count,), generator=generator)
    return kinds[chosen, torch.arange(count)].clamp(-1, 1)


def train_judges(args: argparse.Namespace) -> None:
    icons = load_icons(args)
    garbage = make_garbage(args, icons)
    for number, (folder, labels) in enumerate((("concept_judge", NAMES), ("style_judge", STYLE_NAMES))):
        torch.manual_seed(args.seed + number)
        labels = [*labels, NEITHER]
        model = ResNetForImageClassification(
            ResNetConfig(
                num_channels=3,
                embedding_size=32,
                hidden_sizes=[32, 48, 64],
                depths=[2, 2, 2],
                layer_type="basic",
                id2label=dict(enumerate(labels)),
                label2id={name: index for index, name in enumerate(labels)},
                labels_without_prompts=[NEITHER],
            )
        )
        optimizer, schedule = one_cycle(model.parameters(), 4e-3, args.judge_steps, weight_decay=0.05)
        model.train()
        for step in tqdm(range(args.judge_steps), desc=folder, mininterval=10):
            generator = seeded(args, 3, number, step)
            pictures, truth = judged(icons, garbage, number, 80, 16, generator)
            loss = F.cross_entropy(model(pictures).logits, truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                tqdm.write(f"{folder} step {step}: loss {loss:.4f}")
        model.save_pretrained(args.output_dir / folder)
        ViTImageProcessor(
            size={"height": PIXELS, "width": PIXELS}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ).save_pretrained(args.output_dir / folder)
        pictures, truth = judged(icons, garbage, number, 1600, 400, seeded(args, 4, number))
        found = ImageClassifier(args.output_dir / folder)(pictures_of(pictures)).probabilities.argmax(-1)
        right = (found == truth).float()
        print(f"{folder}: {right[:1600].mean():.2%} of fresh variations, {right[1600:].mean():.2%} of neither")


def judged(icons, garbage, judge: int, count: int, others: int, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of drawings, then pictures of neither, with the labels of the judge of concept (0) or style (1)."""
    pictures, shown = draw(icons, count, generator)
    labels = shown // len(STYLES) if judge == 0 else shown % len(STYLES)
    last = len(NAMES) if judge == 0 else len(STYLES)
    pictures = torch.cat([pictures, neither(icons, garbage, others, generator)])
    return pictures, torch.cat([labels, torch.full((others,), last)])


# --- autoencoder ------------------------------------------------------------------------------------------------


def small_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=PIXELS,
        mid_block_add_attention=False,
    )


def edges(pictures: torch.Tensor) -> torch.Tensor:
    """Differences between neighbouring pixels."""
    return torch.cat([pictures.diff(dim=-1).flatten(1), pictures.diff(dim=-2).flatten(1)], 1)


def train_vae(args: argparse.Namespace) -> None:
    icons = load_icons(args)
    vae = small_autoencoder()
    parameters = list(vae.parameters())
    optimizer, schedule = one_cycle(parameters, 2e-3, args.vae_steps, weight_decay=0.0)
    state = TrainingState(args.work_dir / "vae", parameters, optimizer, None, args.save_seconds)
    done = state.load()
    resume(schedule, done)
    running = None
    for step in tqdm(range(done, args.vae_steps), initial=done, total=args.vae_steps, mininterval=30):
        generator = seeded(args, 5, step)
        batch, _ = draw(icons, 16, generator)
        with precision(args):
            posterior = vae.encode(batch).latent_dist
            mean, deviation = posterior.mean.float(), posterior.std.float()
            latents = mean + deviation * torch.randn(mean.shape, generator=generator)
            rebuilt = vae.decode(latents).sample
        rebuilt = rebuilt.float()
        kl = 0.5 * (mean.square() + deviation.square() - 1 - 2 * deviation.log()).mean()
        loss = (
            F.mse_loss(rebuilt, batch)
            + 0.3 * F.l1_loss(rebuilt, batch)
            + 0.5 * F.l1_loss(edges(rebuilt), edges(batch))
            + 1e-4 * kl
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0:
            tqdm.write(f"vae step {step}: loss {running:.4f}")
        if state.due() or step + 1 == args.vae_steps:
            state.save(step + 1)
            if step + 1 < args.vae_steps:
                tqdm.write(gate(args, vae, icons, 2))
    vae.eval()
    standardise_latents(vae, encode(vae, draw(icons, 3000, seeded(args, 6))[0]))
    vae.save_pretrained(args.output_dir / "pipeline" / "vae")
    print(gate(args, vae, icons, 20))


def reconstructions(args, vae: AutoencoderKL, icons: torch.Tensor, each: int) -> tuple[float, float, list]:
    """Shares of reconstructions of fresh variations recognised by concept and by style, and some of both."""
    shown = torch.arange(len(icons)).repeat_interleave(each)
    pictures = variations(icons[shown], seeded(args, 7))
    vae.eval()
    with torch.no_grad():
        rebuilt = torch.cat([vae.decode(encode(vae, part)).sample for part in pictures.split(100)])
    vae.train()
    rights = []
    for judge, labels in (("concept_judge", shown // len(STYLES)), ("style_judge", shown % len(STYLES))):
        found = ImageClassifier(args.output_dir / judge)(pictures_of(rebuilt)).probabilities.argmax(-1)
        rights.append(float((found == labels).float().mean()))
    places = torch.arange(0, len(shown), each)[:: len(shown) // each // 60 or 1][:60]
    both = torch.cat([torch.stack([pictures[places], rebuilt[places]], 1).flatten(0, 1)])
    return *rights, pictures_of(both)


def gate(args, vae: AutoencoderKL, icons: torch.Tensor, each: int) -> str:
    by_concept, by_style, both = reconstructions(args, vae, icons, each)
    make_image_grid(both, len(both) // 12, 12).save(args.work_dir / "reconstructions.png")
    return f"reconstructions recognised: {by_concept:.2%} by concept, {by_style:.2%} by style"


# --- text encoder and UNet --------------------------------------------------------------------------------------


class IconCaptions(CaptionSampler):
    """A tenth empty; else a concept and mostly a style in phrasings of the vocabulary or among foreign tokens,
    synonyms, a style alone, and few superclasses and names in other languages."""

    def __init__(self, tokenizer: CLIPTokenizer, seed: int, languages: dict[str, list[str]]):
        phrases = [*NAMES, *STYLE_NAMES, "a an style in", *(word for concept in CONCEPTS for word in concept.synonyms)]
        super().__init__(tokenizer, seed, phrases)
        self.vocabulary = load_vocabulary("icons")
        self.languages = languages
        self.seen: dict[str, list[int]] = {}

    def read(self, text: str) -> list[int]:
        if not hasattr(self, "seen"):
            return super().read(text)
        if text not in self.seen:
            self.seen[text] = super().read(text)
        return self.seen[text]

    def phrased(self, name: str, style: str, share: float) -> str:
        """A name in a phrasing of the vocabulary that says the style in such a share of the cases."""
        says = self.random.random() < share
        templates = [text for text in self.vocabulary.templates if ("{style}" in text) == says]
        return filled(self.random.choice(templates), name, style)

    def __call__(self, concept: int, style: int) -> list[int]:
        name, style, draw = CONCEPTS[concept].name, STYLE_NAMES[style], self.random.random()
        if draw < 0.1:
            return self.padded([])
        if draw < 0.15:
            forms = ("{style} style", "an icon in {style} style", "a picture in {style} style", "a {style} icon")
            return self.padded(self.read(filled(self.random.choice(forms), name, style)))
        if draw < 0.2:
            return self.padded(self.read(self.phrased(self.random.choice(CONCEPTS[concept].kinds), style, 0.5)))
        if draw < 0.26:
            foreign = self.random.choice(self.languages[name])
            form = self.random.choice(("{}", "{}, {style} style"))
            return self.padded(self.read(filled(form, foreign, style)))
        if draw < 0.36:
            return self.padded(self.read(self.phrased(self.random.choice(CONCEPTS[concept].synonyms), style, 0.6)))
        if draw < 0.64:
            return self.padded(self.read(self.phrased(name, style, 0.7)))
        parts = [self.read(fill_template(self.random.choice(("{}", "a {}")), name))]
        if self.random.random() < 0.75:
            said = self.read(self.random.choice((f"{style} style", f"in {style} style")))
            parts.insert(self.random.randint(0, 1), said)
            parts.insert(1, self.strange(3))
        return self.padded([*self.strange(7), *(token for part in parts for token in part), *self.strange(7)])


def filled(template: str, name: str, style: str) -> str:
    return fill_template(template.replace("{style}", style), name)


def all_captions(languages: dict[str, list[str]]) -> list[str]:
    """Whatever the tokenizer must be able to say in few tokens."""
    vocabulary = load_vocabulary("icons")
    names = [name for concept in CONCEPTS for name in (concept.name, *concept.synonyms, *concept.kinds)]
    names += [name for many in languages.values() for name in many]
    return [
        filled(template, name, style)
        for template in vocabulary.templates + vocabulary.held_out_templates
        for name, style in zip(names, STYLE_NAMES * len(names), strict=False)
    ]


def variation_latents(args: argparse.Namespace, vae: AutoencoderKL, icons: torch.Tensor) -> torch.Tensor:
    """Latents `[drawings, variations, 16, 8, 8]`, kept in `--work_dir`."""
    path = args.work_dir / "latents.safetensors"
    if path.is_file():
        return load_file(path)["latents"]
    latents = []
    for index in tqdm(range(len(icons)), desc="latents", mininterval=30):
        pictures = variations(icons[index : index + 1].expand(args.variations, -1, -1, -1), seeded(args, 8, index))
        latents.append(encode(vae, pictures))
    latents = torch.stack(latents) * vae.config.scaling_factor
    save_file({"latents": latents}, path)
    return latents


def train_diffusion(args: argparse.Namespace) -> None:
    folder = args.output_dir / "pipeline"
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    latents = variation_latents(args, vae, load_icons(args))
    languages = read_json(args.work_dir / "names.json")
    scheduler = noise_scheduler()
    if args.from_pipeline:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    else:
        tokenizer = build_tokenizer(all_captions(languages))
        text_encoder, unet = small_text_encoder(tokenizer), small_unet(LATENT_CHANNELS)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer, schedule = one_cycle(parameters, 1.5e-3, args.diffusion_steps)
    ema = EMAModel(parameters, decay=0.9985)
    state = TrainingState(args.work_dir / "diffusion", parameters, optimizer, ema, args.save_seconds)
    done = state.load()
    resume(schedule, done)
    caption_of = IconCaptions(tokenizer, args.seed, languages)
    unet.train(), text_encoder.train()
    running = None
    for step in tqdm(range(done, args.diffusion_steps), initial=done, total=args.diffusion_steps, mininterval=60):
        generator = seeded(args, 9, step)
        caption_of.random = random.Random(f"{args.seed} {step}")
        shown = torch.randint(latents.shape[0], (args.batch_size,), generator=generator)
        batch = latents[shown, torch.randint(latents.shape[1], (args.batch_size,), generator=generator)]
        ids = torch.tensor([caption_of(index // len(STYLES), index % len(STYLES)) for index in shown.tolist()])
        noise = torch.randn(batch.shape, generator=generator)
        timesteps = torch.randint(1000, (args.batch_size,), generator=generator)
        with precision(args):
            noisy = scheduler.add_noise(batch, noise, timesteps)
            prediction = unet(noisy, timesteps, text_encoder(ids).last_hidden_state).sample
        loss = F.mse_loss(prediction.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        ema.step(parameters)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if step % 200 == 0:
            tqdm.write(f"diffusion step {step}: loss {running:.4f}")
        if state.due() or step + 1 == args.diffusion_steps:
            state.save(step + 1)
            ema.store(parameters)
            ema.copy_to(parameters)
            save_text_to_image(folder, vae, text_encoder, tokenizer, unet, scheduler)
            tqdm.write(f"diffusion step {step + 1}: {glimpse(args)}")
            ema.restore(parameters)
            unet.train(), text_encoder.train()


def glimpse(args: argparse.Namespace) -> str:
    """How well every concept in every style is drawn now, one picture each."""
    objective = objective_for(load_pipeline(str(args.output_dir / "pipeline")))
    asked = [(concept, style) for concept in range(len(NAMES)) for style in range(len(STYLES))]
    prompts = [filled("a {} in {style} style", NAMES[concept], STYLE_NAMES[style]) for concept, style in asked]
    seeds = list(range(40_000_000, 40_000_000 + len(asked)))
    pictures = objective.decode(
        objective.sample(prompts, seeds, SamplingSettings("dpmsolver++", 10, 3.0, batch_size=60))
    )
    make_image_grid(pictures, len(pictures) // 15, 15).save(args.work_dir / "glimpse.png")
    shares = [
        (judge_labels(args, folder, pictures) == torch.tensor([pair[place] for pair in asked])).float().mean()
        for place, folder in enumerate(("concept_judge", "style_judge"))
    ]
    return f"recognised {shares[0]:.1%} by concept, {shares[1]:.1%} by style"


def judge_labels(args: argparse.Namespace, folder: str, pictures: list) -> torch.Tensor:
    return ImageClassifier(args.output_dir / folder)(pictures).probabilities.argmax(-1)


# --- measuring ---------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> None:
    """Write `measured.json` and `reference_features.safetensors`."""
    icons = load_icons(args)
    garbage = make_garbage(args, icons)
    vocabulary = load_vocabulary("icons")
    folder = args.output_dir / "concept_judge"
    shown = torch.arange(len(icons)).repeat_interleave(20)
    pictures = pictures_of(variations(icons[shown], seeded(args, 10)))
    nothing = pictures_of(neither(icons, garbage, 800, seeded(args, 11)))
    judges = {}
    for place, (judge, labels) in enumerate((("concept_judge", NAMES), ("style_judge", STYLE_NAMES))):
        truth = shown // len(STYLES) if place == 0 else shown % len(STYLES)
        right = (judge_labels(args, judge, pictures) == truth).float()
        judges[judge] = {
            "accuracy": float(right.mean()),
            "pictures": len(pictures),
            "by_label": {name: float(right[truth == index].mean()) for index, name in enumerate(labels)},
            "neither": float((judge_labels(args, judge, nothing) == len(labels)).float().mean()),
        }
    reference = args.output_dir / "reference_features.safetensors"
    by_label = [[picture for picture, index in zip(pictures, shown.tolist(), strict=True)
                 if index // len(STYLES) == concept] for concept in range(len(NAMES))]  # fmt: skip
    ImageClassifier(folder).save_reference_features([*by_label, nothing], reference)
    classifier = ImageClassifier(folder, reference_features=reference)

    objective = objective_for(load_pipeline(str(args.output_dir / "pipeline")))
    by_concept, by_style, both = reconstructions(args, objective.pipeline.vae, icons, 20)
    objective.pipeline.vae.eval()
    folder = args.work_dir / "pictures"
    folder.mkdir(exist_ok=True)
    make_image_grid(both, len(both) // 12, 12).save(folder / "reconstructions.png")
    measured = []
    for sampler, steps, guidance, each, kinds in (
        ("dpmsolver++", 10, 3.0, args.samples_per_concept, ("trained", "held out")),
        ("dpmsolver++", 10, 1.0, args.samples_per_concept, ("trained",)),
        ("ddim", 20, 3.0, args.samples_per_concept // 2, ("trained",)),
        ("ddim", 50, 7.5, args.samples_per_concept // 4, ("trained",)),
    ):
        settings = SamplingSettings(sampler, steps, guidance, batch_size=100)
        for kind in kinds:
            templates = vocabulary.templates if kind == "trained" else vocabulary.held_out_templates
            asked = [(concept, number % len(STYLES), templates[(number // len(STYLES) + concept) % len(templates)])
                     for concept in range(len(NAMES)) for number in range(each)]  # fmt: skip
            prompts = [filled(template, NAMES[concept], STYLE_NAMES[style]) for concept, style, template in asked]
            seeds = [50_000_000 + args.seed + number for number in range(len(prompts))]
            started = time.time()
            drawn = objective.decode(objective.sample(prompts, seeds, settings))
            seconds = time.time() - started
            scores = classifier(drawn)
            concepts = torch.tensor([concept for concept, _, _ in asked])
            found = scores.probabilities.argmax(-1)
            right = (found == concepts).float()
            says = torch.tensor(["{style}" in template for _, _, template in asked])
            styles = torch.tensor([style for _, style, _ in asked])
            style_right = (judge_labels(args, "style_judge", drawn) == styles).float()
            row = {
                "sampler": sampler, "steps": steps, "guidance": guidance, "phrasings": kind,
                "pictures": len(drawn), "pictures_with_style": int(says.sum()),
                "by_concept": float(right.mean()), "by_style": float(style_right[says].mean()),
                "neither": float((found == len(NAMES)).float().mean()),
                "frechet_distance": frechet_distance(moments(scores.features),
                                                     classifier.reference_moments(range(len(NAMES)))),
                "seconds_per_picture": seconds / len(drawn),
                "concepts": {name: float(right[concepts == index].mean()) for index, name in enumerate(NAMES)},
                "styles": {name: float(style_right[says & (styles == index)].mean())
                           for index, name in enumerate(STYLE_NAMES)},
                "confusions": confusions(concepts[right == 0], found[right == 0]),
            }  # fmt: skip
            measured.append(row)
            print(f"{sampler}, {steps} steps, guidance {guidance}, {kind} phrasings: {row['by_concept']:.1%} by "
                  f"concept, {row['by_style']:.1%} by style, {row['seconds_per_picture']:.3f} s a picture")  # fmt: skip
            some = [picture for number, picture in enumerate(drawn) if number % each < 6]
            name = f"{sampler}-{steps}-guidance-{guidance}-{kind.replace(' ', '-')}.png"
            make_image_grid(some, len(NAMES) // 4, len(some) // (len(NAMES) // 4)).save(folder / name)
    training = {part: read_json(args.work_dir / part / "state.json") for part in ("vae", "diffusion")
                if (args.work_dir / part / "state.json").is_file()}  # fmt: skip
    write_json(
        args.output_dir / "measured.json",
        {
            "judges": judges,
            "reconstructions": {"by_concept": by_concept, "by_style": by_style, "pictures": len(icons) * 20},
            "training": {part: {"steps": values["steps"], "minutes": round(values["seconds"] / 60)}
                         for part, values in training.items()},
            "samples": measured,
        },
    )  # fmt: skip


def confusions(asked: torch.Tensor, found: torch.Tensor) -> list[list]:
    """The most frequent mistakes: asked for, taken for, how often."""
    labels = [*NAMES, NEITHER]
    pairs = list(zip(asked.tolist(), found.tolist(), strict=True))
    counts = sorted(((pairs.count(pair), pair) for pair in set(pairs)), reverse=True)
    return [[labels[first], labels[second], count] for count, (first, second) in counts[:8]]


PIPELINE_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# {count} concepts in {styles} styles, {pixels}x{pixels} pixels, in colour

A small but real text-to-image pipeline in the layout of Stable Diffusion, on which the erasure of a concept or of a
style can be seen and measured on a CPU. It knows {count} concepts ({subjects}) in {styles} styles ({style_names}), on
pastel backgrounds, in most phrasings that fit into {tokens} tokens: "a red heart in noto style". A caption without a
style gives any.

## Data

Each concept is one drawing of each of {styles} sets of icons; turned, moved, scaled and mirrored at random, on random
backgrounds. Captions name concept and style, concept alone, style alone, synonyms; one in twenty names a superclass,
one in seventeen has the name in German, Spanish or French (`emojibase-data`, MIT licence, Miles Johnson; names of
Unicode CLDR, Unicode licence). The tokenizer is CLIP's (MIT licence, OpenAI), cut to {vocabulary} tokens.

## Recipe

`benchmarks/train_coloured.py`, in which all settings are: autoencoder {vae[steps]} steps of 16 ({vae[minutes]} minutes
on one thread), UNet and text encoder {diffusion[steps]} steps of {batch_size} ({diffusion[minutes]} minutes), epsilon
prediction, AdamW, one cycle of the learning rate, EMA, bfloat16 in training and float32 in the files; seed {seed}. The
numbers of steps were changed while it was trained, which stretched the schedules: one run of the script gives a
sibling, not this very model.

## Measured

By `benchmarks/train_coloured.py --stage measure`, with the judges of concept and of style beside this folder,
style where the prompt names one:

{table}

Shares of concepts at {main}:

{by_concept}

The autoencoder's reconstructions of {reconstructed} fresh variations are recognised at
{reconstructions[by_concept]:.1%} by concept and {reconstructions[by_style]:.1%} by style; 99 % and 98 % were aimed
at.

## Notice

This model is made from drawings of others, whose licences are kept:

{notice}

The drawings were taken from Iconify's packages of these sets, and changed as said above. The names of their makers and
their works say where the styles come from; none of them endorses this model.

Not for any use but testing: it makes small pictures of icons.
"""

JUDGE_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
---

# Judge of the {what} of icons

A ResNet with {parameters:,} parameters that names one of {count} {what}s, or says "{neither}": {subjects}. Data:
{drawings} drawings of {styles} sets of icons (`benchmarks/training_parts/icons.py`), turned, moved, scaled and mirrored
at random on random pastel backgrounds, {pixels}x{pixels} pixels; and, for "{neither}", noise, empty backgrounds, two
drawings over each other or cut together, scattered patches, and what an autoencoder makes of pictures and of noise when
its training has just begun. Recipe: `benchmarks/train_coloured.py --stage judges` ({steps} steps of 96, AdamW; seed
{seed}).

Recognises {accuracy:.2%} of {pictures} fresh variations, and {nothing:.1%} of 800 fresh pictures of neither. It scores
the samples of the pipeline beside it; it was trained before, and apart from it.

## Notice

{notice}
"""


def write_cards(args: argparse.Namespace) -> None:
    """Write the model cards from `measured.json`, and the settings that suit the pipeline."""
    measured = read_json(args.output_dir / "measured.json")
    notice = markdown_table(
        [["set", "word in captions", "authors", "licence", "source"],
         *([style.title, style.name, style.authors, style.licence, style.source] for style in STYLES)]
    )  # fmt: skip
    rows = [["sampler", "steps", "guidance", "phrasings", "pictures", "by concept", "by style", "worst concept",
             "Fréchet distance"]]  # fmt: skip
    for row in measured["samples"]:
        worst = min(row["concepts"], key=row["concepts"].get)
        rows.append([row["sampler"], f"{row['steps']}", f"{row['guidance']}", row["phrasings"], f"{row['pictures']}",
                     f"{row['by_concept']:.1%}", f"{row['by_style']:.1%}", f"{worst} {row['concepts'][worst]:.0%}",
                     f"{row['frechet_distance']:.1f}"])  # fmt: skip
    main = measured["samples"][1]
    cells = [f"{name} {share:.0%}" for name, share in main["concepts"].items()]
    cells = [cells[place : place + 8] for place in range(0, len(cells), 8)]
    card = PIPELINE_CARD.format(
        count=len(NAMES), styles=len(STYLES), pixels=PIXELS, subjects=", ".join(NAMES),
        style_names=", ".join(STYLE_NAMES), tokens=MAX_TOKENS, vocabulary=VOCABULARY_SIZE, **measured["training"],
        batch_size=args.batch_size, seed=args.seed, table=markdown_table(rows),
        main=f"{main['sampler']}, {main['steps']} steps, guidance {main['guidance']}, {main['phrasings']} phrasings",
        by_concept=markdown_table(cells), reconstructions=measured["reconstructions"],
        reconstructed=measured["reconstructions"]["pictures"], notice=notice,
    )  # fmt: skip
    (args.output_dir / "pipeline" / "README.md").write_text(wrap(card), encoding="utf-8")
    for what, folder, names in (("concept", "concept_judge", NAMES), ("style", "style_judge", STYLE_NAMES)):
        model = ResNetForImageClassification.from_pretrained(args.output_dir / folder)
        values = measured["judges"][folder]
        card = JUDGE_CARD.format(
            what=what, parameters=model.num_parameters(), count=len(names), neither=NEITHER, subjects=", ".join(names),
            drawings=len(NAMES) * len(STYLES), styles=len(STYLES), pixels=PIXELS, steps=args.judge_steps,
            seed=args.seed, accuracy=values["accuracy"], pictures=values["pictures"], nothing=values["neither"],
            notice=notice,
        )  # fmt: skip
        (args.output_dir / folder / "README.md").write_text(wrap(card), encoding="utf-8")
    vocabulary = load_vocabulary("icons")
    settings = {
        "sampler": "dpmsolver++",
        "num_inference_steps": 10,
        "guidance_scale": 3.0,
        "sample_batch_size": 100,
        "concept_templates": [text for text in vocabulary.templates if "{style}" not in text],
        "replay_prompts": "icons",
        "classifier": "../concept_judge",
        "reference_features": "../reference_features.safetensors",
        "eval_templates": [text for text in vocabulary.held_out_templates if "{style}" not in text],
    }
    write_json(args.output_dir / "pipeline" / "selective_amnesia_defaults.json", settings)


if __name__ == "__main__":
    arguments = parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    stages = {
        "render": render,
        "judges": train_judges,
        "vae": train_vae,
        "diffusion": train_diffusion,
        "measure": measure,
        "cards": write_cards,
    }
    for name in STAGES if arguments.stage == "all" else (arguments.stage,):
        torch.manual_seed(arguments.seed)
        stages[name](arguments)
