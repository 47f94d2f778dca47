"""Rectified flow: its table of noise, the density of its timesteps, and which of its losses bound the ELBO."""

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from sa_diffusers import SamplingSettings, erase, load_pipeline, objective_for
from sa_diffusers.commands.erase import main as erasing
from sa_diffusers.commands.evaluate import main as evaluating
from sa_diffusers.evaluation.attacks import Inversion
from sa_diffusers.evaluation.attacks.inversion import INVERTED_TOKEN, invert
from sa_diffusers.families import FlowPath

from .conftest import BY_HAND, as_flags, build_tiny_pipeline, run_here
from .test_loading import edit, refused, without_weights
from .tiny_families import build_sd3


def table(**settings):
    return FlowMatchEulerDiscreteScheduler(**settings)


@pytest.fixture(params=["uniform", "logit_normal"])
def path(request):
    return FlowPath(table(num_train_timesteps=40, shift=3.0), request.param)


def test_noise_grows_with_time_by_the_scheduler_s_own_table():
    u = torch.arange(1, 1001) / 1000
    path = FlowPath(table(shift=3.0))
    torch.testing.assert_close(path.sigmas, 3 * u / (1 + 2 * u))
    torch.testing.assert_close(path.times, 1000 * path.sigmas)
    # A shift that goes by the resolution is not trained with.
    torch.testing.assert_close(FlowPath(table(shift=3.0, use_dynamic_shifting=True)).sigmas, u)


def test_sample_and_noise_follow_from_noised_sample_and_target(path):
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(5, 4, 4, 4, generator=generator)
    noise, timesteps = path.draw_noise(samples, generator), torch.tensor([0, 9, 20, 33, 39])
    noisy, target = path.add_noise(samples, noise, timesteps), path.target(samples, timesteps, noise)
    s = path.sigmas[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - s * target, samples)
    torch.testing.assert_close(noisy + (1 - s) * target, noise)
    torch.testing.assert_close(noisy[-1], noise[-1])


def test_timesteps_are_drawn_by_their_shares(path):
    total = path.num_train_timesteps
    shares = path.shares(torch.arange(total))
    shares = torch.ones(total) if shares is None else shares
    assert shares.sum().item() == pytest.approx(total, rel=1e-5)
    generator = torch.Generator().manual_seed(0)
    drawn = path.draw_timesteps(200_000, generator)
    first, second = drawn.chunk(2)
    assert ((first + second) == total - 1).all()
    found = torch.bincount(drawn, minlength=total) / len(drawn) * total
    assert (found - shares).abs().max() < 0.08
    kind = "logit_normal" if path.density == "logit_normal" else "none"
    torch.manual_seed(0)
    u = compute_density_for_timestep_sampling(kind, 200_000, logit_mean=0.0, logit_std=1.0)
    theirs = torch.bincount((u * total).long(), minlength=total) / len(u) * total
    assert (found - theirs).abs().max() < 0.08


def test_strata_hold_equal_shares_and_all_timesteps_where_there_are_as_many(path):
    generator = torch.Generator().manual_seed(0)
    total = path.num_train_timesteps
    assert path.strata(total, generator).tolist() == list(range(total))
    shares = path.shares(torch.arange(total))
    below = (torch.ones(total) if shares is None else shares).cumsum(0) / total
    counts = torch.zeros(total)
    for _ in range(2_000):
        drawn = path.strata(8, generator)
        assert (drawn.diff() >= 0).all()
        # Each lies where the mass up to it reaches its stratum.
        assert (below[drawn] >= torch.arange(8) / 8 - 1e-4).all()
        assert (
            (below - below.new_tensor(0)).roll(1).index_fill(0, torch.tensor([0]), 0)[drawn] * 8
            <= torch.arange(1, 9) + 1e-3
        ).all()
        counts += torch.bincount(drawn, minlength=total)
    found = counts / counts.sum() * total
    expected = torch.ones(total) if shares is None else shares
    assert (found - expected).abs().max() < 0.15


@pytest.mark.parametrize(
    ("density", "weighting", "shift", "bounds"),
    [
        ("uniform", None, 1.0, True),
        ("uniform", None, 3.0, True),
        ("uniform", None, 6.0, True),
        ("logit_normal", None, 3.0, False),
        ("logit_normal", "sigma_squared", 3.0, False),
    ],
)
def test_which_losses_bound_the_elbo(density, weighting, shift, bounds):
    """As the docstring says: does the weight of the noise's error over log-SNR rise with the noise throughout?"""
    path = FlowPath(table(shift=shift, num_train_timesteps=10_000), density, weighting)
    timesteps = torch.arange(100, 9_900, 50)
    s = path.sigmas.double()
    # The density of s: as often as a timestep is drawn, over how much of s belongs to it.
    shares = path.shares(timesteps)
    shares = torch.ones(len(timesteps)) if shares is None else shares
    drawn = shares.double() / (s[timesteps + 25] - s[timesteps - 25])
    weights = path.weights(timesteps)
    s = s[timesteps]
    whole = drawn * (1 if weights is None else weights.double()) * s / (1 - s)
    assert bool((whole.diff() > 0).all()) == bounds


def test_the_unweighted_loss_of_noise_prediction_is_no_bound_either():
    """The density of log-SNR is the weight of the noise's error, and it falls towards both ends."""
    keep = build_tiny_pipeline().scheduler.alphas_cumprod.double()
    density = -1 / (keep / (1 - keep)).log().diff()
    assert (density.diff() > 0).any()
    assert (density.diff() < 0).any()


def test_other_schedulers_are_refused_before_weights(tmp_path):
    folder = tmp_path / "model"
    build_sd3().save_pretrained(folder)
    DDIMScheduler().save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    assert "DDIMScheduler, the model's scheduler, does not say by a shift" in refused(without_weights(folder))
    table(invert_sigmas=True).save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    assert "sets invert_sigmas" in refused(folder)
    pipeline = build_sd3()
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    assert torch.equal(objective_for(pipeline).path.sigmas, FlowPath(table(shift=3.0)).sigmas)


def test_samplers_and_settings_of_the_other_kind_are_refused():
    flow, other = objective_for(build_sd3()), objective_for(build_tiny_pipeline())
    with pytest.raises(ValueError, match='sampler="ddim" is not for models of rectified flow.*one of flow_euler'):
        flow.check_sampling(SamplingSettings("ddim"), flow.pipeline.scheduler)
    with pytest.raises(ValueError, match='sampler="flow_euler" is for models of rectified flow.*one of ddim, ddpm'):
        other.check_sampling(SamplingSettings("flow_euler"), other.pipeline.scheduler)
    for settings in ({"prediction_type": "epsilon"}, {"snr_gamma": 5.0}, {"noise_offset": 0.1}):
        with pytest.raises(ValueError, match="has no meaning for a model of rectified flow"):
            objective_for(build_sd3(), **settings)
    with pytest.raises(ValueError, match="resolution=18: this model draws multiples of 4 pixels"):
        flow.check_sampling(SamplingSettings("flow_euler", resolution=18), flow.pipeline.scheduler)
    with pytest.raises(ValueError, match="resolution=64: this model draws 48 pixels at the most"):
        flow.check_sampling(SamplingSettings("flow_euler", resolution=64), flow.pipeline.scheduler)


def test_a_token_is_learned_in_every_text_encoder():
    objective = objective_for(build_sd3())
    settings = SamplingSettings("flow_euler", num_inference_steps=2, guidance_scale=1)
    samples = objective.sample(["brad pitt"] * 2, [1, 2], settings)
    invert(objective, samples, Inversion(4, 2, 2, 0.05, "man"))
    plain = objective.encode_prompts([INVERTED_TOKEN])["encoder_hidden_states"]
    for handle in objective.text_encoders():
        token = handle.tokenizer.convert_tokens_to_ids(INVERTED_TOKEN)
        table, begun = handle.encoder.get_input_embeddings().weight, handle.tokenizer("man")["input_ids"][-2]
        assert not torch.allclose(table[token], table[begun])
        with torch.no_grad():
            table[token] += 1
        assert not torch.equal(objective.encode_prompts([INVERTED_TOKEN])["encoder_hidden_states"], plain)
        with torch.no_grad():
            table[token] -= 1


def test_what_sd35_medium_calls_attn2_is_the_image_s_own():
    objective = objective_for(build_sd3(dual_attention_layers=(0,), qk_norm="rms_norm"))
    text, image = (set(objective.select(name)) for name in ("xattn", "noxattn"))
    assert not text & image
    assert "transformer_blocks.0.attn2.to_q.weight" in image
    assert "transformer_blocks.0.attn.norm_added_k.weight" in text
    assert "transformer_blocks.0.attn.to_add_out.weight" in text
    # The last block's text goes nowhere.
    assert "transformer_blocks.1.attn.to_add_out.weight" not in dict(objective.module.named_parameters())
    neither = set(dict(objective.module.named_parameters())) - text - image
    assert {name.split(".")[0] for name in neither} == {"time_text_embed", "context_embedder", "transformer_blocks",
                                                        "norm_out", "proj_out"}  # fmt: skip
    assert all("norm1" in name or "ff_context" in name for name in neither if "transformer_blocks" in name)


def test_t5_may_be_absent(tmp_path):
    build_sd3(t5=False).save_pretrained(tmp_path / "model")
    objective = objective_for(load_pipeline(str(tmp_path / "model")))
    assert len(objective.text_encoders()) == 2
    hidden = objective.encode_prompts(["a dog"])["encoder_hidden_states"]
    assert hidden.shape == (1, 32 + 256, 32)
    assert not hidden[:, 32:].any()


def test_t5_is_left_out_where_that_is_asked_for(tmp_path, clip_folder):
    """Loaded, trained, saved and evaluated without; the card says how it is loaded."""
    build_sd3().save_pretrained(tmp_path / "base")
    settings = {"concept": ["brad pitt"], "surrogate": ["a man"], "pretrained_model_name_or_path": "base",
                "output_dir": "erased", "num_surrogate_images": 2, "num_replay_images": 2, "num_inference_steps": 2,
                "ewc_weight": 0, "max_train_steps": 1, "train_batch_size": 1, "num_eval_images": 2, "report_to": "none",
                "no_t5": True, "train_method": "xattn"}  # fmt: skip
    result = run_here(erasing, as_flags({**BY_HAND, **settings}), tmp_path)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "erased" / "text_encoder_3").exists()
    load = 'DiffusionPipeline.from_pretrained("erased", tokenizer_3=None, text_encoder_3=None)'
    assert load in (tmp_path / "erased" / "README.md").read_text()
    prints = {
        objective_for(load_pipeline(str(tmp_path / "base"), no_t5=no_t5)).fingerprint() for no_t5 in (True, False)
    }
    assert len(prints) == 2
    erased = DiffusionPipeline.from_pretrained(tmp_path / "erased", tokenizer_3=None, text_encoder_3=None)
    assert erased.text_encoder_3 is None
    flags = ["--base", "base", "--erased", "erased", "--protocol", "concept", "--clip", clip_folder, "--images", "2",
             "--neighbours", "dog", "--unrelated", "cat"]  # fmt: skip
    result = run_here(evaluating, flags, tmp_path)
    assert result.returncode == 0, result.stderr
    del settings["pretrained_model_name_or_path"], settings["output_dir"], settings["concept"], settings["surrogate"]
    again, _ = erase(tmp_path / "base", "brad pitt", "a man", **{**BY_HAND, **settings})
    assert again.text_encoder_3 is None
    assert all(torch.equal(value, erased.transformer.state_dict()[name])
               for name, value in again.transformer.state_dict().items())  # fmt: skip
    with pytest.raises(ValueError, match="load it with tokenizer_3=None, text_encoder_3=None"):
        erase(build_sd3(), "brad pitt", "a man", no_t5=True)
    with pytest.raises(ValueError, match="no_t5 has no meaning for StableDiffusionPipeline"):
        erase(build_tiny_pipeline(), "brad pitt", "a man", no_t5=True)
    build_tiny_pipeline().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="no_t5 has no meaning for StableDiffusionPipeline"):
        load_pipeline(str(tmp_path / "other"), no_t5=True)
