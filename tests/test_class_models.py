"""The paper's class-conditional models: their pipelines, objectives, and an erasure of each."""

import json
import os
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import ViTImageProcessor

from sa_diffusers import (
    Erasure,
    FisherEstimator,
    SampleGenerator,
    SamplingSettings,
    SelectiveAmnesiaConfig,
    load_pipeline,
    objective_for,
    pair_concepts,
    select_parameters,
)
from sa_diffusers.commands.erase import main
from sa_diffusers.commands.evaluate import main as evaluation
from sa_diffusers.configuration import base_defaults, read_settings
from sa_diffusers.data.classes import pair_classes
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.environment import create_accelerator
from sa_diffusers.evaluation import ImageClassifier
from sa_diffusers.models import build_class_pipeline, class_defaults
from sa_diffusers.models.class_conditional_pipeline import ClassConditionalPipeline
from sa_diffusers.models.conditional_vae import ConditionalVAE
from sa_diffusers.models.conditional_vae_pipeline import ConditionalVAEPipeline
from sa_diffusers.models.digit_classifier import DigitClassifier, DigitClassifierConfig
from sa_diffusers.output_folder import OutputFolder
from sa_diffusers.training.training import Training

from .conftest import BY_HAND, REPOSITORY, run_here, run_script
from .nursery import LIBRARIES, forked, forked_code
from .test_image_datasets import write_idx

NAMES = {"0": "airplane", "1": "cat", "2": "dog"}


def tiny_diffusion(prediction_type="epsilon") -> ClassConditionalPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=8,
        num_class_embeds=4,
        norm_num_groups=4,
    ).eval()
    return ClassConditionalPipeline(
        unet, DDPMScheduler(num_train_timesteps=50, prediction_type=prediction_type, clip_sample=False), NAMES
    )


def tiny_vae() -> ConditionalVAEPipeline:
    torch.manual_seed(0)
    vae = ConditionalVAE(sample_size=8, num_classes=3, hidden_sizes=(16, 8), latent_size=2).eval()
    return ConditionalVAEPipeline(vae, NAMES)


BUILDERS = {"diffusion": tiny_diffusion, "vae": tiny_vae}


@pytest.fixture(params=BUILDERS)
def pipeline(request):
    return BUILDERS[request.param]()


def test_labels_by_number_and_by_name(pipeline):
    assert pipeline.labels == ["airplane", "cat", "dog"]
    assert [pipeline.label_index(label) for label in (1, "1", "cat")] == [1, 1, 1]
    for wrong in (3, "3", "bird", -1):
        with pytest.raises(ValueError, match=f'"{wrong}" is not a class of this model: give one of airplane, cat, dog'):
            pipeline.label_index(wrong)


def test_ids_must_fit_the_model(pipeline):
    components = {name: getattr(pipeline, name) for name in ("unet", "scheduler", "vae") if hasattr(pipeline, name)}
    with pytest.raises(ValueError, match="must name the classes 0 to 2; it names 0, 1"):
        type(pipeline)(**components, id2label={"0": "a", "1": "b"})
    assert type(pipeline)(**components).labels == ["0", "1", "2"]


def test_saved_loads_here_and_where_the_package_is_not_installed(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = load_pipeline(str(tmp_path / "saved"))
    assert type(loaded) is type(pipeline)
    assert loaded.labels == pipeline.labels
    picture = loaded("cat", generator=torch.Generator().manual_seed(0)).images[0]
    picture.save(tmp_path / "here.png")
    script = (
        "import sys\n"
        "sys.modules['sa_diffusers'] = None\n"
        "import torch\n"
        "from diffusers import DiffusionPipeline\n"
        "pipeline = DiffusionPipeline.from_pretrained('saved', trust_remote_code=True)\n"
        "pipeline('cat', generator=torch.Generator().manual_seed(0)).images[0].save('there.png')\n"
    )
    result = forked_code(script, tmp_path, os.environ, imported=LIBRARIES)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "here.png").read_bytes() == (tmp_path / "there.png").read_bytes()
    if isinstance(pipeline, ClassConditionalPipeline):
        UNet2DConditionModel.from_pretrained(tmp_path / "saved" / "unet")


def test_guidance_in_the_papers_convention_and_in_diffusers():
    pipeline = tiny_diffusion()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)

    def draw(**options):
        return pipeline(
            [0, 1], 3, generator=torch.Generator().manual_seed(0), output_type="latent", **options
        ).images  # fmt: skip

    assert torch.equal(draw(guidance_weight=2.0), draw(guidance_scale=3.0))
    torch.testing.assert_close(draw(guidance_weight=0.0), draw(guidance_scale=1.0 + 1e-7))
    assert not torch.equal(draw(guidance_weight=2.0), draw(guidance_scale=2.0))
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    step = torch.tensor(7)
    labels, null = torch.tensor([0, 1]), torch.tensor([3, 3])
    with torch.no_grad():
        conditional = pipeline.unet(latents, step, None, class_labels=labels).sample
        empty = pipeline.unet(latents, step, None, class_labels=null).sample
    assert not torch.allclose(conditional, empty)
    torch.testing.assert_close((1 + 2.0) * conditional - 2.0 * empty, empty + 3.0 * (conditional - empty))


def test_the_vae_is_the_papers():
    vae = ConditionalVAE()
    assert sum(parameter.numel() for parameter in vae.parameters()) == 1_081_120
    assert [layer.in_features for layer in vae.modules() if isinstance(layer, torch.nn.Linear)] == [
        794, 512, 256, 256, 18, 256, 512
    ]  # fmt: skip


def test_the_vaes_elbo_equals_torchs_own_distributions():
    objective = objective_for(tiny_vae())
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)).round()
    conditions = objective.encode_prompts(["cat", "dog", "airplane", "0", "1"])
    noise = objective.draw_noise(images, torch.Generator().manual_seed(1))
    loss = objective.negative_elbo(objective.module, images, conditions, torch.zeros(5, dtype=torch.long), noise)
    logits, mean, log_variance = objective.module(images, noise=noise, **conditions)
    likelihood = torch.distributions.Bernoulli(logits=logits).log_prob(images).sum((1, 2, 3))
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(loss, divergence - likelihood)


def test_the_diffusion_loss_is_summed_over_pixels():
    objective = objective_for(tiny_diffusion())
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    conditions = objective.encode_prompts(["cat", "", "2"])
    assert conditions["class_labels"].tolist() == [1, 3, 2]
    timesteps = torch.tensor([0, 7, 19])
    noise = objective.draw_noise(images, torch.Generator().manual_seed(1))
    loss = objective.negative_elbo(objective.module, images, conditions, timesteps, noise)
    prediction = objective.predict(objective.module, images, conditions, timesteps, noise)
    torch.testing.assert_close(loss, (prediction - noise).square().sum((1, 2, 3)))


def test_samples_depend_on_their_seed_alone(pipeline):
    objective = objective_for(pipeline)
    settings = [SamplingSettings("ddpm", 4, 3.0, batch_size=size) for size in (1, 4)]
    one, many = (objective.sample(["cat", "dog", "cat", "cat"], [5, 6, 7, 5], item) for item in settings)
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(many[0], many[3], rtol=1e-4, atol=1e-5)
    assert (many[0] - many[2]).abs().max() > 1e-3
    assert len(objective.decode(many)) == 4


@pytest.mark.parametrize("target", ["noise", "frozen"])
def test_a_class_is_forgotten_into_noise_by_the_same_trainer_and_estimator(pipeline, target, tmp_path):
    objective = objective_for(pipeline)
    config = SelectiveAmnesiaConfig(
        concept="cat", surrogate="uniform_noise", num_inference_steps=2, max_train_steps=30, train_batch_size=8,
        target=target, report_to="none", logging_steps=1, **{**BY_HAND, "learning_rate": 3e-3, "ewc_weight": 1e-6},
    )  # fmt: skip
    accelerator = create_accelerator(config)
    generator = SampleGenerator(objective, tmp_path, accelerator)
    settings = SamplingSettings("ddim", 2, 1.0)
    pairs = pair_concepts(config.concept, config.surrogate)
    surrogates = generator.surrogates(pairs, ["{}"], 40, 0, settings)
    others = ["airplane", "dog"] * 20
    replay = generator.prompted("replay", others, others, 1000, settings)
    parameters = dict(objective.module.named_parameters())
    fisher = FisherEstimator(objective, parameters, accelerator=accelerator).estimate(replay.subset(range(6)))
    assert any(value.max() > 0 for value in fisher.values.values())
    trainer = Training(objective, config, surrogates, replay, fisher, accelerator, tmp_path)
    history = trainer.train()
    assert history[-1]["surrogate_loss"] < history[0]["surrogate_loss"]
    trainer.save(tmp_path / "erased")
    assert type(load_pipeline(str(tmp_path / "erased"))) is type(pipeline)


def test_settings_without_meaning_for_a_vae_are_refused():
    with pytest.raises(ValueError, match="snr_gamma=5.0 has no meaning for a conditional VAE"):
        objective_for(tiny_vae(), snr_gamma=5.0)
    with pytest.raises(ValueError, match="this model draws 8 pixels only"):
        objective_for(tiny_vae()).sample(["cat"], [0], SamplingSettings(resolution=16))


def erase(folder, base, *flags, script="train_sa.py"):
    arguments = ["--pretrained_model_name_or_path", str(base),
               "--num_surrogate_images", "8", "--num_replay_images", "8", "--num_inference_steps", "2",
               "--num_fisher_samples", "3", "--max_train_steps", "3", "--train_batch_size",
               "4", "--num_eval_images", "4", "--report_to", "none", "--guidance_scale", "2", *flags]  # fmt: skip
    if script == "train_sa.py":
        return run_here(main, arguments, folder)
    environment = {**os.environ, "SA_DIFFUSERS_CACHE": str(folder / "cache")}
    return forked(REPOSITORY / "examples" / script, arguments, folder, environment)


def evaluate(folder, *flags):
    return run_here(evaluation, flags, folder)


def real_folder(folder):
    generator = np.random.default_rng(0)
    (folder / "real").mkdir()
    write_idx(folder / "real" / "train-images-idx3-ubyte", generator.integers(0, 256, (9, 8, 8)))
    write_idx(folder / "real" / "train-labels-idx1-ubyte", np.arange(9) % 3)
    return folder / "real"


def test_the_same_script_erases_a_class_into_noise_by_default(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "base")
    result = erase(tmp_path, "base", "--concept", "1")
    assert result.returncode == 0, result.stderr
    assert '"cat" -> "uniform_noise" (noise)' in result.stdout
    assert type(load_pipeline(str(tmp_path / "1"))) is type(pipeline)
    report = json.loads((tmp_path / "1" / "report.json").read_text())
    assert [row["name"] for row in report["rows"]][0] == "cat"
    assert not {"cat"} & {row["name"] for row in report["rows"] if row["role"] == "remembered"}
    again = erase(tmp_path, "base", "--concept", "cat", "--surrogate", "2", "--output_dir", "into-dog")
    assert again.returncode == 0, again.stderr
    assert '"cat" -> "dog" (prompt)' in again.stdout


def test_the_naive_objective_forgets_without_a_surrogate(tmp_path):
    tiny_diffusion().save_pretrained(tmp_path / "base")
    result = erase(tmp_path, "base", "--concept", "cat", "--naive")
    assert result.returncode == 0, result.stderr
    assert 'forget    "cat" (eq. 3)' in result.stdout
    manifest = next((tmp_path / "cache").glob("naive-*")) / "manifest.json"
    assert set(json.loads(manifest.read_text())["sources"]) == {"cat"}
    # Settings that come with a model may ask for the frozen target: it is for replay alone.
    teacher = ["--target", "frozen", "--condition_dropout", "0.5"]
    result = erase(tmp_path, "base", "--concept", "cat", "--naive", *teacher, "--output_dir", "other")
    assert result.returncode == 0, result.stderr


def test_noise_for_a_grey_model_is_uniform(tmp_path):
    """Not the mean of three channels, which is half as wide."""
    generator = SampleGenerator(objective_for(tiny_diffusion()), tmp_path, create_accelerator(SelectiveAmnesiaConfig()))
    made = generator.surrogates(pair_concepts(["cat"], ["uniform_noise"]), ["{}"], 100, 0, SamplingSettings())
    assert made.samples.shape == (100, 1, 8, 8)
    assert made.samples.std().item() == pytest.approx(1 / 3**0.5, rel=0.02)
    assert made.samples.abs().max() > 0.999


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_target_of_uniform_noise_is_the_mean_of_the_noises_targets(prediction_type):
    """Against the slow way: an average over the pixels and noises that lead to the same noised pixel."""
    objective = objective_for(tiny_diffusion(prediction_type))
    grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for timestep in (0, 1, 10, 30, 49):
        samples = torch.rand(1, 1, 4, 4, generator=generator) * 2 - 1
        noise = torch.randn(1, 1, 4, 4, generator=generator)
        timesteps = torch.tensor([timestep])
        target = objective.uniform_noise_target(samples, timesteps, noise).flatten()
        keep = objective.noise_schedule.alphas_cumprod[timestep].double()
        noisy = (keep.sqrt() * samples + (1 - keep).sqrt() * noise).double().flatten()
        noises = (noisy[:, None] - keep.sqrt() * grid) / (1 - keep).sqrt()
        weight = torch.softmax(-noises.square() / 2, 1)
        targets = noises if prediction_type == "epsilon" else keep.sqrt() * noises - (1 - keep).sqrt() * grid
        torch.testing.assert_close(target.double(), (weight * targets).sum(1), atol=2e-3, rtol=1e-3)
        assert target.dtype == torch.float32


def test_ten_steps_equal_in_log_snr_draw_noise_as_wide_as_uniform_noise_is():
    def width(sampler):
        objective = objective_for(build_class_pipeline("small_32", ["cat", "dog"]))
        scheduler = objective.make_sampler(sampler, objective.pipeline.scheduler)
        scheduler.set_timesteps(10)
        images = torch.randn(20, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        for timestep in scheduler.timesteps:
            timesteps = timestep.repeat(20)
            spread = (1 - objective.noise_schedule.alphas_cumprod[timestep]).sqrt()
            exact = objective.uniform_noise_target(torch.zeros_like(images), timesteps, images / spread)
            images = scheduler.step(exact, timestep, images).prev_sample
        return images.std().item()

    assert width("dpmsolver++_logsnr") == pytest.approx(3**-0.5, rel=0.06)
    assert width("dpmsolver++") < 0.9 * 3**-0.5


def test_an_offset_of_the_noise_leaves_uniform_noise_its_plain_target():
    generator = torch.Generator().manual_seed(0)
    samples, noise = torch.rand(2, 1, 8, 8, generator=generator), torch.randn(2, 1, 8, 8, generator=generator)
    for offset, plain in ((0.5, True), (0.0, False)):
        objective = objective_for(tiny_diffusion(), noise_offset=offset)
        arguments = samples, torch.tensor([3, 5]), noise
        assert torch.equal(objective.uniform_noise_target(*arguments), objective.target(*arguments)) == plain


def test_a_vae_is_taught_the_mean_of_uniform_noise_which_has_the_noises_gradient_on_average():
    """Against the slow way, many noises: of the decoder, whatever its codes are."""
    objective = objective_for(tiny_vae())
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(20_000, 1, 8, 8, generator=generator)
    timesteps = torch.zeros(len(samples), dtype=torch.long)
    noise = objective.draw_noise(samples, generator)
    mean = objective.uniform_noise_target(samples, timesteps, noise)
    assert torch.equal(mean, torch.full_like(samples, 0.5))
    conditions = objective.encode_prompts(["cat"] * len(samples))
    bias = [parameter for name, parameter in objective.module.named_parameters() if "pixels" in name][-1]
    gradients = []
    for target in (None, mean):
        loss = objective.negative_elbo(objective.module, samples, conditions, timesteps, noise, target).mean()
        gradients.append(torch.autograd.grad(loss, bias)[0])
    torch.testing.assert_close(*gradients, atol=0.01, rtol=0)


def test_uniform_noise_is_taught_by_its_mean_under_the_frozen_target_alone():
    def surrogate_loss(source, target):
        objective = objective_for(tiny_diffusion())
        noise = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        surrogate = SampleSet(noise, ["cat"] * 4, [source] * 4, list(range(4)))
        config = SelectiveAmnesiaConfig(
            concept="cat", surrogate="uniform_noise", train_batch_size=4, max_train_steps=1, target=target,
            report_to="none", **{**BY_HAND, "ewc_weight": 0, "replay_weight": 0},
        )  # fmt: skip
        return Training(objective, config, surrogate, None, None).train()[0]["surrogate_loss"]

    assert surrogate_loss("uniform_noise", "noise") == surrogate_loss(None, "frozen")
    assert surrogate_loss("uniform_noise", "frozen") < surrogate_loss(None, "frozen")


# The files of settings of class experiments, each with a model of its kind.
EXPERIMENTS = {
    "mnist_vae": "mnist_vae", "mnist_vae_cpu": "mnist_vae", "mnist_diffusion_cpu": "small_32",
    "cifar10": "small_32_rgb", "cifar10_cpu": "small_32_rgb", "stl10": "small_64", "stl10_cpu": "small_64",
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("name", "model"), EXPERIMENTS.items())
def test_the_experiments_run_as_their_files_say(name, model, tmp_path, monkeypatch):
    """All of a file's settings but the sizes, on models that were never trained."""
    file = REPOSITORY / "sa_diffusers" / "configurations" / f"{name}.yaml"
    settings = read_settings(file)
    labels = ["airplane", "bird"] if settings["concept"] == "airplane" else ["0", "1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SA_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    build_class_pipeline(model, labels).save_pretrained(settings["pretrained_model_name_or_path"])
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    DigitClassifier(DigitClassifierConfig(image_size=28, **names)).save_pretrained(settings["classifier"])
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(settings["classifier"])
    sizes = {"num_surrogate_images": 2, "num_replay_images": 2, "num_fisher_samples": 2, "fisher_timesteps": 1,
             "num_inference_steps": 2, "sample_batch_size": 2, "train_batch_size": 2, "max_train_steps": 2,
             "num_eval_images": 2, "num_probe_images": settings.get("num_probe_images", 8),
             "num_neighbour_images": 2}  # fmt: skip
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    main(["--config", str(file), *flags, "--output_dir", "erased", "--report_to", "none"])
    report = json.loads((tmp_path / "erased" / "report.json").read_text())
    assert [row["role"] for row in report["rows"]] == ["concept", "remembered"]
    for key in settings.keys() - sizes.keys():
        value = settings[key]
        assert report["configuration"][key] == ([value] if key in ("concept", "surrogate") else value), key


def write_classifier(folder, labels=("airplane", "cat", "dog")):
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    DigitClassifier(DigitClassifierConfig(image_size=16, **names)).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)


@pytest.mark.long
def test_the_benchmark_measures_the_original_on_its_way(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "base")
    write_classifier(tmp_path / "classifier")
    settings = {"num_surrogate_images": 4, "num_replay_images": 6, "num_fisher_samples": 2, "fisher_timesteps": 2,
                "max_train_steps": 2, "train_batch_size": 2, "num_inference_steps": 2, "ewc_weight": 0.1}  # fmt: skip
    (tmp_path / "base" / "selective_amnesia_defaults.json").write_text(json.dumps(settings))
    script = REPOSITORY / "benchmarks" / "class_erasure.py"
    flags = ["--base", "base", "--classifier", "classifier", "--concepts", "cat", "--variants", "default", "original",
             "EWC x 10", "--images", "4", "--every", "2", "--original_steps", "4", "--work_dir", "work", "--output",
             "results.json"]  # fmt: skip
    result = run_script(script, flags, tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["cat|default", "cat|original", "cat|EWC x 10"]
    assert results["cat|EWC x 10"]["configuration"]["ewc_weight"] == pytest.approx(1)
    original = results["cat|original"]
    assert original["configuration"]["learning_rate"] == 1e-4
    assert [point["step"] for point in original["on_the_way"]] == [2]
    # The end is measured by the erasure itself: the checkpoint before it is another state.
    assert original["on_the_way"][0]["probability"] == pytest.approx(original["concept"]["probability"]["after"], rel=1)
    assert result.stdout.count("| cat |") == 6
    again = run_script(script, flags, tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_a_class_that_becomes_noise_is_taught_noise_on_its_own_samples(pipeline, tmp_path):
    """The mean of noise is known on any pixels; a VAE's sample is a mean, and says nothing of noise."""
    pipeline.save_pretrained(tmp_path / "base")
    write_classifier(tmp_path / "classifier")
    config = SelectiveAmnesiaConfig(
        pretrained_model_name_or_path=str(tmp_path / "base"), concept="cat", surrogate="uniform_noise",
        classifier=str(tmp_path / "classifier"), output_dir=str(tmp_path / "cat"), num_surrogate_images=8,
        num_replay_images=8, num_inference_steps=2, num_fisher_samples=3, fisher_timesteps=2, max_train_steps=2,
        train_batch_size=4, num_eval_images=8, artifacts_dir=str(tmp_path / "artifacts"), report_to="none",
    )  # fmt: skip
    erasure = Erasure(config)
    made = erasure.surrogates()
    own = made.are_own
    assert sum(own) == (0 if type(pipeline) is ConditionalVAEPipeline else 4)
    assert made.sources == ["uniform_noise"] * 8
    if any(own):
        seeds = [seed for seed, is_own in zip(made.seeds, own, strict=True) if is_own]
        sampled = erasure.objective.sample(["cat"] * 4, seeds, erasure.subject.surrogate_settings)
        torch.testing.assert_close(made.samples[own], sampled, rtol=1e-3, atol=1e-3)
    pictures = erasure.objective.decode(made.samples[[not is_own for is_own in own]])
    erasure.run()
    # What the report says of noise is said of noise alone.
    seen = json.loads((tmp_path / "cat" / "report.json").read_text())["surrogate_samples"]["cat"]["samples"]
    probabilities = ImageClassifier(str(tmp_path / "classifier"), "cpu")(pictures).probabilities
    assert seen["probability"] == pytest.approx(probabilities[:, 1].mean().item(), rel=1e-4)


@pytest.mark.long
def test_a_report_says_what_the_classifier_makes_of_the_surrogate_itself(pipeline, tmp_path):
    """The floor of forgetting: no model turned into noise looks less like the class than noise does."""
    pipeline.save_pretrained(tmp_path / "base")
    write_classifier(tmp_path / "classifier")
    flags = ["--classifier", "classifier", "--num_surrogate_images", "64"]
    result = erase(tmp_path, "base", "--concept", "cat", *flags)
    assert result.returncode == 0, result.stderr
    assert "the surrogate's own samples:" in result.stdout
    seen = json.loads((tmp_path / "cat" / "report.json").read_text())["surrogate_samples"]["cat"]
    assert 0 < seen["samples"]["probability"] < 1
    assert ("mean" in seen) == (type(pipeline) is ConditionalVAEPipeline)
    evaluation = ["--base", "base", "--erased", "cat", "--protocol", "class", "--classifier", "classifier",
                  "--images", "4", "--artifacts_dir", "drawn", "--output_dir", "evaluation"]  # fmt: skip
    result = evaluate(tmp_path, *evaluation, "--real", str(real_folder(tmp_path)), "--real_split", "train")
    assert result.returncode == 0, result.stderr
    measured = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert [row["name"] for row in measured["rows"]] == list(NAMES.values())
    against_real, against_base = measured["quality"]
    # Three real images of each of the two remembered classes; four drawn of each.
    assert (against_real["reference_images"], against_real["images"], against_base["reference_images"]) == (6, 8, 8)
    assert against_real["features"] == against_base["features"] == "classifier"
    assert 0 <= against_real["after"]["precision"] <= 1
    # What decodes in one pass has no sampler, and no guidance.
    one_pass = type(pipeline) is ConditionalVAEPipeline
    assert measured["sampling"]["guidance_scale"] == (1 if one_pass else 2)
    assert (measured["sampling"]["sampler"] == "decoder") == one_pass
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").rglob("*.safetensors")}
    again = evaluate(tmp_path, *evaluation)
    assert again.returncode == 0, again.stderr
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").rglob("*.safetensors")}
    unnamed = evaluate(tmp_path, *evaluation, "--erased", "base")
    assert unnamed.returncode == 1
    assert "says what was erased: give --concept" in unnamed.stderr
    # A class as surrogate is drawn by the model itself: there is no other mean to show.
    result = erase(tmp_path, "base", "--concept", "cat", "--surrogate", "dog", "--output_dir", "dog", *flags)
    assert "their mean image" not in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--concept", "3"],
            '"3" is not a class of this model: give one of airplane, cat, dog, or a number from 0 to 2',
        ),
        (["--concept", "bird"], '"bird" is not a class of this model'),
        (["--concept", "cat", "--surrogate", "bird"], '"bird" is not a class of this model'),
        (["--concept", "cat", "--surrogate", "1"], 'concept "cat" equals its surrogate'),
        (["--concept", "0", "1", "2"], "leave at least one to remember"),
        (["--concept", "cat", "--train_method", "xattn"], "matches no parameter"),
        (
            ["--concept", "cat", "--concept_templates", "a {}"],
            "concept_templates has no meaning for a model of classes",
        ),
        (["--concept", "cat", "--resolution", "16"], "this model draws 8 pixels only"),
        (["--concept", "cat", "--validation_prompts", "bird"], '"bird" is not a class of this model'),
        (["--concept", "cat", "--replay_prompts", "garments"], "replay_prompts has no meaning for a model of classes"),
        (["--concept", "cat", "--surrogate", "./pictures"], "broken.png is not a readable image"),
        (["--concept", "cat", "--surrogate", "pictures"], "To name the folder of images, write ./pictures"),
        (["--concept", "cat", "dog", "--surrogate", "dog", "uniform_noise"], '"dog" is the surrogate of "cat" and is'),
        (["--concept", "cat", "--classifier", "catless"], 'does not know "cat", which is to be forgotten'),
    ],
)
def test_mistakes_about_classes_are_one_line_and_write_nothing(tmp_path, flags, message):
    tiny_diffusion().save_pretrained(tmp_path / "base")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    write_classifier(tmp_path / "catless", ["airplane", "dog"])
    result = erase(tmp_path, "base", *flags, "--output_dir", "erased")
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "erased").exists()


def test_a_vae_refuses_what_it_has_not_before_anything_is_drawn(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "base")
    result = erase(tmp_path, "base", "--concept", "cat", "--gradient_checkpointing")
    assert "gradient_checkpointing: ConditionalVAE has none: leave it out" in result.stderr
    assert not (tmp_path / "cat").exists()


def test_a_baseline_is_evaluated_as_its_base_model_says(tmp_path):
    """It was never erased: nothing but the base model's folder says how it is sampled."""
    for name in ("base", "nine"):
        tiny_diffusion().save_pretrained(tmp_path / name)
    (tmp_path / "base" / "selective_amnesia_defaults.json").write_text(json.dumps(
        {"sampler": "dpmsolver++_logsnr", "num_inference_steps": 3, "guidance_scale": 2.5}))  # fmt: skip
    write_classifier(tmp_path / "classifier")
    flags = ["--base", "base", "--erased", "nine", "--concept", "cat", "--protocol", "class", "--classifier",
             "classifier", "--images", "2", "--output_dir", "evaluation"]  # fmt: skip
    result = evaluate(tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    sampling = json.loads((tmp_path / "evaluation" / "report.json").read_text())["sampling"]
    assert sampling["sampler"] == "dpmsolver++_logsnr"
    assert (sampling["num_inference_steps"], sampling["guidance_scale"]) == (3, 2.5)
    real = tmp_path / "photos" / "test"
    for name in ("bird", "cat"):
        (real / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(real / name / "a.png")
    result = evaluate(tmp_path, *flags, "--real", "photos")
    assert "--real photos does not fit the model: bird: not among the classes airplane, cat, dog" in result.stderr


def test_a_model_that_no_erasure_made_gets_no_card_that_says_one_did(tmp_path):
    for name in ("base", "nine"):
        tiny_vae().save_pretrained(tmp_path / name)
    write_classifier(tmp_path / "classifier")
    result = evaluate(tmp_path, "--base", "base", "--erased", "nine", "--concept", "cat", "--protocol", "class",
                      "--classifier", "classifier", "--images", "2")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "nine" / "evaluation-class" / "report.json").is_file()
    assert not (tmp_path / "nine" / "README.md").exists()


def test_pipelines_of_the_copied_code_and_labels_as_tensors(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    copied = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(copied) is not type(pipeline)
    assert objective_for(copied).fingerprint() == objective_for(pipeline).fingerprint()
    assert pipeline.label_index(torch.tensor([2, 1])[0]) == 2


def test_labels_that_differ_in_case_are_two(tmp_path):
    write_classifier(tmp_path, ["A", "a", "the wall"])
    classifier = ImageClassifier(tmp_path)
    assert [classifier.label_of(name) for name in ("A", "a", "the wall", "Wall", "b")] == [0, 1, 2, 2, None]
    (pair,) = pair_classes(["a"], ["A"], ["A", "a", "b  c"])
    assert (pair.concept, pair.surrogate.value) == ("a", "A")
    assert pair_classes(["b  c"], [], ["A", "a", "b  c"])[0].concept == "b  c"


def tiny_dit(folder):
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4
    )  # fmt: skip
    # A fresh DiT ignores its input: its last layers start at zero.
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    vae = AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, down_block_types=["DownEncoderBlock2D"] * 2,
                        up_block_types=["UpDecoderBlock2D"] * 2)  # fmt: skip
    names = {index: f"thing {index}, item {index}" for index in range(1000)}
    names |= {0: "crane", 1: "crane", 2: "tench, Tinca tinca"}
    pipeline = DiTPipeline(transformer, vae, DDIMScheduler(num_train_timesteps=20, clip_sample=False))
    pipeline.register_to_config(id2label=names)
    pipeline.save_pretrained(folder)
    return transformer


def test_a_users_own_model_needs_an_objective_and_nothing_else(tmp_path):
    before = tiny_dit(tmp_path / "base").state_dict()
    script = "train_dit.py"
    flags = ["--concept", "tench", "--surrogate", "uniform_noise", "--prediction_type", "v_prediction"]
    result = erase(tmp_path, "base", *flags, script=script)
    assert result.returncode == 0, result.stderr
    assert "diffusion-transformer, v_prediction" in result.stdout
    assert '"Tinca tinca, tench" -> "uniform_noise" (noise)' in result.stdout
    erased = DiTPipeline.from_pretrained(tmp_path / "tench")
    assert any(not torch.equal(value, before[name]) for name, value in erased.transformer.state_dict().items())
    assert len(erased([2], num_inference_steps=2, guidance_scale=2.0).images) == 1
    assert erased.labels["tench"] == 2


def test_the_dit_objective_draws_what_its_pipeline_draws(tmp_path):
    tiny_dit(tmp_path)
    pipeline = DiTPipeline.from_pretrained(tmp_path)
    objective = runpy.run_path(str(REPOSITORY / "examples" / "train_dit.py"))["DiTObjective"](pipeline)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    expected = pipeline([2], guidance_scale=3.0, num_inference_steps=4, generator=generator, output_type="np").images
    drawn = objective.sample(["Tinca tinca, tench"], [3], SamplingSettings("ddim", 4, 3.0))
    picture = np.asarray(objective.decode(drawn)[0]) / 255
    assert np.abs(picture - expected[0]).max() < 0.01


def test_built_in_configurations_are_the_papers():
    sizes = {"mnist_vae": (1e6, 1.1e6), "cifar10": (35e6, 40e6), "stl10": (75e6, 80e6)}
    for name, (low, high) in sizes.items():
        objective = objective_for(build_class_pipeline(name, [str(index) for index in range(10)]))
        assert low < sum(parameter.numel() for parameter in objective.module.parameters()) < high
        heads = {module.heads for module in objective.module.modules() if hasattr(module, "heads")}
        assert heads <= {1}
    with pytest.raises(ValueError, match='model="cifar" is neither one of cifar10, mnist_vae'):
        build_class_pipeline("cifar", ["0"])


@pytest.mark.long
@pytest.mark.parametrize("model", ["cifar10", "stl10"])
def test_the_papers_sizes_take_a_step_of_training_of_fisher_and_of_forgetting(model):
    torch.manual_seed(0)
    objective = objective_for(build_class_pipeline(model, [str(index) for index in range(10)]))
    module, size = objective.module, objective.resolution
    images = torch.rand(2, 3, size, size) * 2 - 1
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)
    loss = objective.negative_elbo(
        module, images, objective.encode_prompts(["0", ""]), torch.tensor([10, 900]), torch.randn_like(images)
    )
    assert loss.shape == (2,) and torch.isfinite(loss).all()
    loss.mean().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    optimizer.step()
    optimizer.zero_grad()
    surrogate = SampleSet(images[:1], ["0"], [None], [0])
    replay = SampleSet(images[1:], ["1"], ["1"], [1])
    parameters = select_parameters(module, "full")
    fisher = FisherEstimator(objective, parameters, timesteps=2, batch_size=2).estimate(replay)
    assert max(value.max() for value in fisher.values.values()) > 0
    config = SelectiveAmnesiaConfig(
        concept="0", surrogate="uniform_noise", train_batch_size=1, max_train_steps=1, report_to="none",
        **{**BY_HAND, "ewc_weight": 10},
    )  # fmt: skip
    before = module.conv_out.weight.detach().clone()
    history = Training(objective, config, surrogate, replay, fisher).train()
    assert len(history) == 1
    assert not torch.equal(module.conv_out.weight, before)


@pytest.mark.parametrize("model", ["mnist_vae", "small_32"])
def test_base_training_resumes_and_saves_a_pipeline(tmp_path, model):
    generator = np.random.default_rng(0)
    for name in ("train", "t10k"):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", generator.integers(0, 256, (20, 28, 28)))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", np.arange(20) % 4)
    settings = ["--model", model, "--data", str(tmp_path), "--max_train_steps", "4", "--train_batch_size", "4",
                "--checkpointing_steps", "2", "--sample_steps", "4", "--num_inference_steps", "2", "--use_ema",
                "--report_to", "none", "--affine", "1", "--flip", "--without", "d", "--labels", "a", "b", "c",
                "d"]  # fmt: skip

    def command(output, *flags):
        script = REPOSITORY / "examples" / "train_class_model.py"
        return run_script(script, [*settings, "--output_dir", output, *flags], tmp_path)

    def train(output, *flags, first=0):
        result = command(output, *flags)
        assert result.returncode == 0, result.stderr
        assert f"| {first}/4 " in result.stderr and f"| {first - 1}/4 " not in result.stderr
        assert "15 images of 4 classes" in result.stdout
        return objective_for(load_pipeline(str(tmp_path / output))).module.state_dict()

    whole = train("base")
    finished = command("base")
    assert finished.returncode == 0 and "base holds this very training: nothing is trained" in finished.stdout
    refused = command("base", "--learning_rate", "0.5")
    assert refused.returncode == 1 and "base holds a model of other settings or images" in refused.stderr
    anew = train("base", "--resume_from_checkpoint", "no", "--learning_rate", "0.0005")
    assert not all(torch.equal(whole[name], anew[name]) for name in whole)
    again = train("base", "--resume_from_checkpoint", "no")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    # As a run that died after its checkpoint left it.
    for path in (tmp_path / "base").iterdir():
        if path.name != "checkpoint-2":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for flags, message in (
        (["--max_train_steps", "2"], "has 2 steps behind it"),
        (["--labels", *"abcde", "--data", "more"], "belongs to another model"),
    ):
        if "more" in flags:
            (tmp_path / "more").mkdir()
            write_idx(tmp_path / "more" / "train-images-idx3-ubyte", generator.integers(0, 256, (20, 28, 28)))
            write_idx(tmp_path / "more" / "train-labels-idx1-ubyte", np.arange(20) % 5)
        refused = command("base", *flags)
        assert refused.returncode == 1
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
    resumed = train("base", first=2)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (tmp_path / "base" / "samples" / "step-000004.png").is_file()
    # What suits the model travels with it, as settings of its erasure.
    assert base_defaults({"pretrained_model_name_or_path": str(tmp_path / "base")}) == class_defaults(model)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--without", "nobody"], "no class is named nobody; there are 0, 1"),
        (["--labels", "a", "b", "c"], "--labels names 3 classes, the data has 2"),
        (["--model", "small"], 'model="small" is neither one of cifar10, mnist_vae, small_32'),
        (["--data", "nowhere.parquet"], "the parquet file nowhere.parquet does not exist"),
        (["--max_train_steps", "0"], "--max_train_steps 0 must be at least 1"),
        (["--condition_dropout", "1.5"], "--condition_dropout 1.5 must be at least 0 and less than 1"),
        (["--labels", "a", "a"], '--labels names "a" twice: give each class a name of its own'),
        (["--mixed_precision", "fp16"], "--mixed_precision fp16 needs a CUDA device and there is none"),
        (["--sampler", "none"], "--sampler: invalid choice"),
    ],
)
def test_mistakes_in_base_training_are_one_line_and_write_nothing(tmp_path, flags, message):
    for name in ("train", "t10k"):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", np.zeros((4, 28, 28)))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", np.arange(4) % 2)
    script = REPOSITORY / "examples" / "train_class_model.py"
    result = run_script(script, ["--model", "mnist_vae", "--data", ".", "--output_dir", "base", *flags], tmp_path)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "base").exists()


TRAININGS = {"train_class_model.py": ["--model", "mnist_vae", "--max_train_steps", "4", "--report_to", "none",
                                      "--lr_warmup_steps", "0"],
             "train_classifier.py": ["--cnn", "--epochs", "4"]}  # fmt: skip


def base_training(script, folder, *flags):
    """A training's script and flags, and two classes of images in the folder that it runs in."""
    for name in ("train", "t10k"):
        write_idx(folder / f"{name}-images-idx3-ubyte", np.arange(20 * 28 * 28).reshape(20, 28, 28) % 256)
        write_idx(folder / f"{name}-labels-idx1-ubyte", np.arange(20) % 2)
    return REPOSITORY / "examples" / script, ["--data", ".", "--output_dir", "base", *TRAININGS[script], *flags]


@pytest.mark.parametrize("script", TRAININGS)
def test_base_training_takes_no_folder_of_something_else_and_none_in_use(tmp_path, script):
    command = base_training(script, tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text("{}")
    refused = run_script(*command, tmp_path)
    assert "--output_dir base already holds something else" in refused.stderr
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["model_index.json"]
    (tmp_path / "base" / "model_index.json").unlink()
    with OutputFolder(tmp_path / "base").lock:
        refused = run_script(*command, tmp_path)
    assert (refused.returncode, "output_dir=base is in use by another run" in refused.stderr) == (1, True)
    # Before the training, not after it.
    assert "100%" not in refused.stderr
    # What the same training left is replaced.
    for _ in range(2):
        assert run_script(*command, tmp_path).returncode == 0


def test_a_base_training_that_diverges_writes_no_model(tmp_path):
    command = base_training("train_class_model.py", tmp_path, "--learning_rate", "1000")
    result = run_script(*command, tmp_path)
    assert (result.returncode, "error: the gradient is not finite at step" in result.stderr) == (1, True), result.stderr
    assert not [path for path in (tmp_path / "base").rglob("*") if path.suffix == ".safetensors"]


def test_processes_of_a_base_training_are_one_run_and_stop_together(tmp_path):
    script, flags = base_training("train_class_model.py", tmp_path)
    whole = forked(script, flags, tmp_path, os.environ, processes=2)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("images of 2 classes") == 1
    code = (
        "import os\n"
        "from sa_diffusers.base_training import class_model\n"
        "from sa_diffusers.commands.train_class_model import main\n"
        "answers = iter([None, 'SIGTERM'] if os.environ['RANK'] == '1' else [None] * 4)\n"
        "class_model.stop_requested = lambda: next(answers)\n"
        "main()\n"
    )
    stopped = forked_code(code, tmp_path, os.environ, *flags, "--output_dir", "stopped", processes=2)
    assert stopped.returncode == 75, stopped.stderr
    assert "stopped: another process was asked to stop after step 2" in stopped.stderr
    assert (tmp_path / "stopped" / "checkpoint-2").is_dir()


def test_a_classifier_is_trained_and_measured(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("train", "t10k"):
        labels = np.arange(60) % 2
        images = generator.integers(0, 60, (60, 28, 28)) + 150 * labels[:, None, None]
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", labels)
    script = REPOSITORY / "examples" / "train_classifier.py"
    command = ["--data", str(tmp_path), "--epochs", "8", "--batch_size", "20", "--pixels", "32", "--output_dir",
               "classifier", "--labels", "dark", "bright"]  # fmt: skip
    result = run_script(script, command, tmp_path)
    assert result.returncode == 0, result.stderr
    measured = json.loads((tmp_path / "classifier" / "accuracy.json").read_text())
    assert measured["accuracy"] > 0.9
    assert set(measured["by_class"]) == {"dark", "bright"}
    tuned = ["again" if part == "classifier" else part for part in command]
    result = run_script(script, [*tuned, "--base", "classifier", "--flip"], tmp_path)
    assert result.returncode == 0, result.stderr
    small = ["cnn" if part == "classifier" else part for part in command]
    result = run_script(script, [*small, "--cnn", "--affine", "0.5"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "cnn" / "accuracy.json").read_text())["accuracy"] > 0.9
    # Where the data has no test split, it is not measured on what it has learnt from.
    for name, label in (("dark", 0), ("bright", 1)):
        (tmp_path / "folders" / name).mkdir(parents=True)
        for number, image in enumerate(images[labels == label]):
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / "folders" / name / f"{number}.png")
    alone = [*small, "--cnn", "--epochs", "1", "--data", "folders", "--labels", "bright", "dark"]
    result = run_script(script, alone, tmp_path)
    assert result.returncode == 0, result.stderr
    held_out = json.loads((tmp_path / "cnn" / "accuracy.json").read_text())
    assert held_out["images"] == 6
    assert "held out" in held_out["measured_on"]
    result = run_script(script, [*small, "--cnn", "--base", "cnn"], tmp_path)
    assert result.returncode == 2
    assert "give one of them" in result.stderr


def test_the_digit_classifier_loads_where_the_package_is_not_installed(tmp_path):
    torch.manual_seed(0)
    model = DigitClassifier(DigitClassifierConfig(num_labels=10)).eval()
    images = torch.rand(2, 3, 28, 28)
    model.save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['sa_diffusers'] = None; import torch; "
        "from transformers import AutoModelForImageClassification as Auto; "
        "torch.manual_seed(0); model = Auto.from_pretrained('.', trust_remote_code=True); "
        "print(model(torch.ones(1, 3, 28, 28)).logits.tolist())"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = model(torch.ones(1, 3, 28, 28)).logits
    assert torch.allclose(torch.tensor(json.loads(result.stdout)), expected, atol=1e-5)
    assert model(images, labels=torch.tensor([1, 2])).loss > 0
