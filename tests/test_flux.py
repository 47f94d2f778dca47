"""FLUX beside what every family does, and the models that are distilled to few steps."""

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline

from sa_diffusers import Erasure, SamplingSettings, SelectiveAmnesiaConfig, erase, load_pipeline, objective_for
from sa_diffusers.evaluation.attacks import Inversion
from sa_diffusers.evaluation.attacks.inversion import INVERTED_TOKEN, invert
from sa_diffusers.families import family_in

from .conftest import BY_HAND
from .test_loading import edit, refused, without_weights
from .tiny_families import SIZE, build_flux, build_sd3, build_xl

SAMPLING = SamplingSettings("flow_euler", num_inference_steps=2, guidance_scale=1, resolution=SIZE)


@pytest.fixture
def folder(tmp_path):
    build_flux().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def config_of(base, **settings):
    return SelectiveAmnesiaConfig(
        concept=["brad pitt"], surrogate=["a man"], pretrained_model_name_or_path=str(base), report_to="none",
        **settings,
    )  # fmt: skip


def test_samples_are_latents_whatever_the_transformer_takes():
    objective = objective_for(build_flux())
    samples = objective.sample(["a dog"], [1], SAMPLING)
    assert samples.shape == (1, 4, 8, 8)
    again = objective_for(FluxImg2ImgPipeline(**FluxImg2ImgPipeline.from_pipe(build_flux()).components))
    assert type(again.pipeline) is FluxPipeline
    assert torch.equal(again.sample(["a dog"], [1], SAMPLING), samples)
    assert objective.rows_of_step(SAMPLING) == 1
    # A view that is not whole in memory, as of one sample at many timesteps.
    timesteps = torch.arange(0, 900, 300)
    conditions = {
        name: value.expand(3, *value.shape[1:]) for name, value in objective.encode_prompts(["a dog"]).items()
    }
    noisy = samples.expand(3, -1, -1, -1)
    with torch.no_grad():
        assert objective.denoise(objective.module, noisy, timesteps, conditions).shape == noisy.shape


def test_guidance_is_an_input_that_training_and_sampling_share():
    objective = objective_for(build_flux())
    conditions, generator = objective.encode_prompts(["a dog"]), torch.Generator().manual_seed(0)
    samples, noise = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))

    def loss():
        with torch.no_grad():
            return objective.negative_elbo(objective.module, samples, conditions, torch.tensor([500]), noise)

    first, drawn, whole = loss(), objective.sample(["a dog"], [1], SAMPLING), objective.fingerprint()
    objective.embedded_guidance = 1.0
    assert objective.fingerprint() != whole
    assert not torch.equal(loss(), first)
    assert not torch.equal(objective.sample(["a dog"], [1], SAMPLING), drawn)


def test_defaults_are_those_of_flux_unless_they_are_said(folder):
    config = Erasure(config_of(folder, resolution=SIZE)).config
    assert (config.sampler, config.num_inference_steps, config.guidance_scale) == ("flow_euler", 28, 1.0)
    config = Erasure(config_of(folder, resolution=SIZE, num_inference_steps=50)).config
    assert (config.sampler, config.num_inference_steps) == ("flow_euler", 50)
    with pytest.raises(ValueError, match='sampler="ddim" is not for models of rectified flow'):
        Erasure(config_of(folder, resolution=SIZE, sampler="ddim"))


def test_the_streams_are_told_apart_and_single_blocks_are_in_neither():
    objective = objective_for(build_flux())
    text, image = (set(objective.select(name)) for name in ("xattn", "noxattn"))
    assert not text & image
    assert "transformer_blocks.0.attn.add_k_proj.weight" in text
    assert "transformer_blocks.0.ff.net.2.weight" in image
    assert not any(name.startswith("single_") for name in text | image)
    assert objective.select(r"^single_transformer_blocks\.")


def test_a_token_is_learned_in_both_text_encoders():
    objective = objective_for(build_flux())
    samples = objective.sample(["brad pitt"] * 2, [1, 2], SAMPLING)
    invert(objective, samples, Inversion(3, 2, 2, 0.05, "man"))
    for handle in objective.text_encoders():
        token, begun = (
            handle.tokenizer.convert_tokens_to_ids(INVERTED_TOKEN),
            handle.tokenizer("man")["input_ids"][-2],
        )
        table = handle.encoder.get_input_embeddings().weight
        assert not torch.allclose(table[token], table[begun])


def test_models_that_fill_in_are_refused_before_weights(folder):
    edit(without_weights(folder) / "transformer" / "config.json", in_channels=96)
    assert "its transformer takes 96 channels, its autoencoder makes 16" in refused(folder)


# Models that are distilled to few steps


def test_what_is_distilled_is_refused_before_weights_unless_it_is_asked_for(folder):
    edit(folder / "transformer" / "config.json", guidance_embeds=False)
    with pytest.raises(ValueError, match=r"takes no guidance, as that of FLUX.1-schnell\).*--train_distilled"):
        Erasure(config_of(without_weights(folder)))
    build_flux(guidance_embeds=False).save_pretrained(folder)
    # Looking at it is no training.
    objective = objective_for(load_pipeline(str(folder)))
    assert objective.sample(["a dog"], [1], SAMPLING).shape == (1, 4, 8, 8)
    settings = {**BY_HAND, "num_surrogate_images": 2, "num_replay_images": 2, "num_inference_steps": 2, "ewc_weight": 0,
                "max_train_steps": 1, "train_batch_size": 1, "num_eval_images": 2, "resolution": SIZE,
                "train_method": "xattn"}  # fmt: skip
    with pytest.raises(ValueError, match="as that of FLUX.1-schnell"):
        erase(build_flux(guidance_embeds=False), "brad pitt", "a man", **settings)
    _, report = erase(build_flux(guidance_embeds=False), "brad pitt", "a man", train_distilled=True, **settings)
    assert report.rows


@pytest.mark.parametrize(
    ("build", "name", "base"),
    [
        (build_xl, "sdxl-turbo", "stabilityai/stable-diffusion-xl-base-1.0"),
        (build_xl, "my-SDXL-Lightning", "stabilityai/stable-diffusion-xl-base-1.0"),
        (build_sd3, "stable-diffusion-3.5-large-turbo", "stabilityai/stable-diffusion-3.5-large"),
        (build_flux, "FLUX.1-schnell", "black-forest-labs/FLUX.1-dev"),
    ],
)
def test_a_name_tells_what_is_distilled(build, name, base, tmp_path):
    build().save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=f"as its name {name} says.*erase from {base} in its place"):
        Erasure(config_of(without_weights(tmp_path / name)))
    build().save_pretrained(tmp_path / "copy")
    edit(tmp_path / "copy" / "model_index.json", _name_or_path=f"somebody/{name}")
    with pytest.raises(ValueError, match=f"as its name somebody/{name} says"):
        Erasure(config_of(without_weights(tmp_path / "copy")))


@pytest.mark.parametrize("name", ["turbot", "no-brad-pitt", "hyperrealism", "flux-dev"])
def test_other_names_are_just_names(name, tmp_path):
    build_flux().save_pretrained(tmp_path / name)
    Erasure(config_of(tmp_path / name, resolution=SIZE))


def test_configurations_tell_what_is_distilled(tmp_path):
    pipeline = build_xl()
    pipeline.scheduler = EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    pipeline.save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="its scheduler is that of SDXL-Turbo"):
        Erasure(config_of(without_weights(tmp_path / "one")))
    build_xl().save_pretrained(tmp_path / "other")
    edit(tmp_path / "other" / "unet" / "config.json", time_cond_proj_dim=256)
    with pytest.raises(ValueError, match="as latent consistency models do"):
        Erasure(config_of(without_weights(tmp_path / "other")))
    assert family_in(str(tmp_path / "other")).kind == "stable-diffusion-xl"
