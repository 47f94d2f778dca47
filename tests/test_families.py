"""A family is one file; its path is asked for noise, targets and timesteps; old names and forms go on working."""

import inspect
import json
import warnings

import pytest
import torch
from diffusers import DDPMScheduler

from sa_diffusers import Erasure, SelectiveAmnesiaConfig, load_pipeline, objective_for
from sa_diffusers.commands.erase import main as erasing
from sa_diffusers.commands.evaluate import main as evaluation
from sa_diffusers.configuration import SAMPLERS as configuration_samplers
from sa_diffusers.families import SUPPORTED_PIPELINES, DiscretePath, Objective, OneStepPath, family_of, registry
from sa_diffusers.families.base import digest_of
from sa_diffusers.families.samplers import sampler_class
from sa_diffusers.samplers import SAMPLERS

from .conftest import as_flags, build_tiny_pipeline, run_here


@pytest.fixture
def new_family():
    """The file that adds a family, as a user's script would import it, for one test."""
    from . import pixel_text_family

    registry.register("PixelTextPipeline")(pixel_text_family.PixelTextObjective)
    yield pixel_text_family
    registry._FAMILIES.pop("PixelTextPipeline")


def test_a_family_in_one_file_is_erased_evaluated_and_attacked(new_family, tmp_path, tiny_settings, clip_folder):  # noqa: F811
    known = build_tiny_pipeline()
    new_family.build(known.text_encoder, known.tokenizer).save_pretrained(tmp_path / "base")
    assert "PixelTextPipeline" in SUPPORTED_PIPELINES
    settings = {**tiny_settings, "pretrained_model_name_or_path": str(tmp_path / "base"), "train_method": "xattn"}
    result = run_here(erasing, as_flags(settings), tmp_path)
    assert result.returncode == 0, result.stderr
    assert "pixel-text, epsilon" in result.stdout
    before, after = (load_pipeline(str(tmp_path / name)).unet.state_dict() for name in ("base", "erased"))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    # The family's own meaning of the selection, not that of UNets.
    assert changed
    assert all(name.split("attn2.")[-1] in ("to_k.weight", "to_v.weight") for name in changed)

    # diffusers alone cannot load it, and the card does not say so.
    card = (tmp_path / "erased" / "README.md").read_text()
    assert "# First import the module that registers PixelTextPipeline." in card
    assert 'pipeline = load_pipeline("erased")' in card
    assert "DiffusionPipeline.from_pretrained" not in card

    common = ["--base", "base", "--erased", "erased", "--clip", clip_folder, "--images", "2"]
    result = run_here(
        evaluation, [*common, "--protocol", "concept", "--neighbours", "dog", "--unrelated", "cat"], tmp_path
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "erased" / "evaluation-concept" / "report.json").read_text())
    concept = next(row for row in report["rows"] if row["role"] == "concept")
    assert concept["change"]["rmse"] > 0

    attack = ["--inversion_steps", "3", "--inversion_images", "2", "--inversion_batch_size", "2"]
    result = run_here(evaluation, [*common, "--protocol", "robustness", *attack], tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "erased" / "evaluation-robustness" / "report.json").read_text())
    learned = [entry["inversion"] for entry in report["robustness"] if "inversion" in entry]
    assert len(learned) == 2
    assert all(entry["first_loss"] > 0 for entry in learned)


def test_a_pipeline_of_no_family_is_refused_with_those_that_are(new_family, tmp_path):
    known = build_tiny_pipeline()
    new_family.build(known.text_encoder, known.tokenizer).save_pretrained(tmp_path / "base")
    taken = registry._FAMILIES.pop("PixelTextPipeline")
    try:
        with pytest.raises(
            ValueError, match="PixelTextPipeline is not supported yet; supported: .*StableDiffusionPipeline"
        ):
            load_pipeline(str(tmp_path / "base"), kinds=SUPPORTED_PIPELINES)
    finally:
        registry._FAMILIES["PixelTextPipeline"] = taken


def test_samplers_are_one_table(monkeypatch, tiny_objective):
    """A line in it is a choice of the command line and a sampler of every diffusion model."""
    assert tuple(SAMPLERS) == configuration_samplers
    for name in SAMPLERS:
        kind, settings = sampler_class(name)
        assert settings.keys() <= inspect.signature(kind).parameters.keys()
    with pytest.raises(ValueError, match='sampler="heun" is not one of ddim, ddpm, pndm'):
        tiny_objective.make_sampler("heun", tiny_objective.pipeline.scheduler)
    monkeypatch.setitem(SAMPLERS, "heun", ("HeunDiscreteScheduler", {}))
    sampler = tiny_objective.make_sampler("heun", tiny_objective.pipeline.scheduler)
    assert type(sampler).__name__ == "HeunDiscreteScheduler"
    assert sampler.config.beta_end == 0.012


def test_a_family_says_how_the_card_samples_from_it():
    assert family_of("StableDiffusionPipeline").card_snippet('a "dog"') == 'image = pipeline("a \\"dog\\"").images[0]'
    snippet = family_of("ConditionalVAEPipeline").card_snippet(2)
    assert snippet == "image = pipeline(class_labels=[2]).images[0]"
    assert family_of("KandinskyPipeline") is None


def test_the_encoders_of_a_model_of_text_carry_gradients_for_attacks(tiny_objective):
    (handle,) = tiny_objective.text_encoders()
    assert not tiny_objective.encode_prompts(["a dog"])["encoder_hidden_states"].requires_grad
    handle.encoder.get_input_embeddings().weight.requires_grad_(True)
    tiny_objective.encode_prompts(["a dog"])["encoder_hidden_states"].sum().backward()
    assert handle.encoder.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.fixture(params=["epsilon", "v_prediction"])
def path(request):
    return DiscretePath(DDPMScheduler(num_train_timesteps=40, prediction_type=request.param), snr_gamma=5.0)


def test_strata_hold_one_timestep_each_and_all_where_there_are_as_many(path):
    generator = torch.Generator().manual_seed(0)
    assert path.strata(40, generator).tolist() == list(range(40))
    for _ in range(20):
        drawn = path.strata(8, generator)
        assert (drawn // 5).tolist() == list(range(8))


def test_timesteps_come_in_mirrored_pairs(path):
    first, second = path.draw_timesteps(10, torch.Generator().manual_seed(0)).chunk(2)
    assert (first + second).tolist() == [39] * 5


def test_sample_and_noise_follow_from_noised_sample_and_target(path):
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(6, 1, 4, 4, generator=generator)
    noise, timesteps = path.draw_noise(samples, generator), torch.arange(2, 38, 6)
    noisy, target = path.add_noise(samples, noise, timesteps), path.target(samples, timesteps, noise)
    keep = path.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    if path.prediction_type == "epsilon":
        found = (noisy - (1 - keep).sqrt() * target) / keep.sqrt()
    else:
        found = keep.sqrt() * noisy - (1 - keep).sqrt() * target
    torch.testing.assert_close(found, samples, atol=1e-4, rtol=1e-4)
    ratio = (keep / (1 - keep)).flatten()
    least = ratio.clamp(max=5.0)
    expected = least / ratio if path.prediction_type == "epsilon" else least / (ratio + 1)
    torch.testing.assert_close(path.weights(timesteps), expected)


def test_a_vae_has_one_step_and_noise_of_its_codes_width():
    path, samples = OneStepPath(3), torch.rand(5, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    assert path.draw_timesteps(4, generator).tolist() == [0] * 4
    assert path.strata(1, generator).tolist() == [0]
    noise = path.draw_noise(samples, generator)
    assert noise.shape == (5, 3)
    assert torch.equal(path.add_noise(samples, noise, torch.zeros(5, dtype=torch.long)), samples)


class OwnLoss(Objective):
    """As users wrote objectives before there were paths: all of the loss by themselves."""

    kind = "own"
    reduction = "mean"
    prediction_type = "epsilon"

    def __init__(self, pipeline, *settings):
        self.pipeline, self.module, self.inner = pipeline, pipeline.unet, objective_for(pipeline)
        self.num_train_timesteps = 1000

    resolution = property(lambda self: 16)

    @property
    def device(self):
        return self.module.device

    def to(self, device):
        return self

    def fingerprint(self):
        return digest_of([self.module], [])

    def encode_prompts(self, prompts):
        return self.inner.encode_prompts(prompts)

    def encode_images(self, images, seed):
        return self.inner.encode_images(images, seed)

    def sample(self, prompts, seeds, settings):
        return self.inner.sample(prompts, seeds, settings)

    def decode(self, samples):
        return self.inner.decode(samples)

    def draw_noise(self, samples, generator):
        return torch.randn(samples.shape, generator=generator)

    def predict(self, module, samples, conditions, timesteps, noise):
        return self.inner.predict(module, samples, conditions, timesteps, noise)

    def target(self, samples, timesteps, noise):
        return noise

    def negative_elbo(self, module, samples, conditions, timesteps, noise, target=None):
        target = noise if target is None else target
        return (self.predict(module, samples, conditions, timesteps, noise) - target).square().flatten(1).mean(1)

    def save(self, folder):
        self.pipeline.save_pretrained(folder)


def test_an_objective_with_a_loss_of_its_own_is_erased_as_the_built_in_one_is(tiny_settings, tmp_path):
    weights = []
    for number, builder in enumerate((objective_for, OwnLoss)):
        settings = {
            **tiny_settings,
            "output_dir": str(tmp_path / str(number)),
            "artifacts_dir": str(tmp_path / f"a{number}"),
        }
        Erasure(SelectiveAmnesiaConfig(**settings), build_objective=builder).run()
        weights.append(load_pipeline(str(tmp_path / str(number))).unet.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


OLD_NAMES = """
from sa_diffusers.objectives import Objective, SUPPORTED_PIPELINES, load_pipeline, objective_for
from sa_diffusers.objectives.base import Conditions, Denoiser, SamplingSettings, draw_timesteps, fingerprint_module
from sa_diffusers.objectives.diffusion import DiffusionObjective
from sa_diffusers.objectives.latent_diffusion import LatentDiffusionObjective
from sa_diffusers.objectives.class_conditional import ClassConditionalObjective, truncated_normal_mean
from sa_diffusers.objectives.conditional_vae import ConditionalVAEObjective
from sa_diffusers.objectives.loading import HUB_TIMEOUT_SECONDS, expanded, resolved_revision
from sa_diffusers.data.prompts import fill_template, image_files, load_vocabulary, pair_classes, replay_prompts
from sa_diffusers.data.prompts import names_concept, read_prompts
from sa_diffusers.trainer import SelectiveAmnesiaTrainer, FrozenModule, create_accelerator, sampling_settings
from sa_diffusers.ewc import ElasticWeightConsolidation
from sa_diffusers.checkpoints import TrainingState, checkpoints, choose_checkpoint, read_checkpoint, write_checkpoint
"""


@pytest.mark.parametrize("line", OLD_NAMES.strip().splitlines())
def test_old_imports_work_with_a_warning(line):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        exec(line, names := {})
    assert any(
        issubclass(entry.category, DeprecationWarning) and "is now sa_diffusers." in str(entry.message)
        for entry in seen
    )
    assert len(names) > 1  # beside the built-in names
