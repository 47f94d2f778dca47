"""The page on writing a family: its file is a family, and what it says of methods is of those that there are."""

import inspect
import re
from types import FunctionType, MethodType

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from sa_diffusers import load_pipeline, objective_for
from sa_diffusers.families import DiffusionObjective, FlowObjective, Objective, TextToImageObjective, family_of

from . import test_every_family as every_family
from .conftest import BY_HAND, REPOSITORY, as_flags, run_script
from .tiny_families import Tiny, flow_vae, places_of, t5_encoder, t5_tokenizer

PAGE = REPOSITORY / "docs" / "new-family.md"


def build_aura():
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, out_channels=4,
        pos_embed_max_size=64,
    ).eval()  # fmt: skip
    for parameter in (transformer.pos_embed.pos_embed, transformer.register_tokens):
        torch.nn.init.normal_(parameter, std=0.02)
    # Gates that are open, as a trained one's are: else the text counts for next to nothing.
    transformer.time_step_proj.linear_2.weight.data *= 30
    vae = flow_vae()
    vae.register_to_config(shift_factor=None)
    return AuraFlowPipeline(
        t5_tokenizer(), t5_encoder(32), vae, transformer, FlowMatchEulerDiscreteScheduler(shift=1.73)
    )


def aura_loss(pipeline, samples, prompts, timesteps, noise):
    """Of rectified flow, by hand."""
    hidden, *_ = pipeline.encode_prompt([*prompts], do_classifier_free_guidance=False)
    times, sigmas = places_of(pipeline.scheduler, timesteps)
    noisy = (1.0 - sigmas) * samples + sigmas * noise
    prediction = pipeline.transformer(noisy, hidden, times / 1000, return_dict=False)[0]
    return (prediction.float() - (noise - samples).float()).square().flatten(1).mean(1)


TINY = Tiny(
    build_aura,
    "transformer",
    aura_loss,
    latents=lambda vae, images, generator: vae.encode(images).latent_dist.sample(generator) * vae.config.scaling_factor,
)


@pytest.fixture
def script(tmp_path):
    """The page's file."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    file = tmp_path / "aura_flow.py"
    file.write_text(code)
    return file


@pytest.fixture
def registered(script):
    exec(compile(script.read_text(), script.name, "exec"), {"__name__": "aura_flow"})


def test_a_class_that_is_not_known_is_told_of_the_page(tmp_path):
    assert PAGE.is_file()
    with pytest.raises(ValueError, match="AuraFlowPipeline is not supported yet;.* write a family, as docs/new-fam"):
        objective_for(build_aura())
    build_aura().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="write a family, as docs/new-family.md shows"):
        load_pipeline(str(tmp_path / "base"), kinds=())


def test_the_page_s_file_is_a_command_that_erases(script, tmp_path):
    build_aura().save_pretrained(tmp_path / "base")
    settings = {
        **BY_HAND, "concept": "brad pitt", "surrogate": "a man", "pretrained_model_name_or_path": "base",
        "output_dir": "erased", "num_surrogate_images": 4, "num_replay_images": 4, "num_inference_steps": 2,
        "num_fisher_samples": 2, "fisher_timesteps": 2, "max_train_steps": 2, "train_batch_size": 2,
        "num_eval_images": 2, "train_method": "xattn", "report_to": "none",
    }  # fmt: skip
    result = run_script(script, as_flags(settings), tmp_path)
    assert result.returncode == 0, result.stderr
    assert "aura-flow, velocity" in result.stdout
    assert "flow_euler, 2 steps, guidance 3.5" in result.stdout
    before, after = (AuraFlowPipeline.from_pretrained(tmp_path / name).transformer.state_dict()
                     for name in ("base", "erased"))  # fmt: skip
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    selected = family_of("AuraFlowPipeline").selections["xattn"]
    assert moved and all(re.search(selected, name) for name in moved)


@pytest.mark.parametrize(
    "check",
    [
        every_family.test_the_loss_is_that_of_the_published_script,
        every_family.test_images_become_samples_as_in_the_published_script,
        every_family.test_sampling_and_decoding_are_the_pipeline_s_own,
        every_family.test_fisher_information_over_all_timesteps_is_that_of_autograd,
        every_family.test_attacks_reach_every_text_encoder,
    ],
)
def test_the_page_s_file_does_what_every_family_must(check, registered):
    check(TINY)


def test_a_prediction_of_another_shape_is_told(registered):
    """With an axis too many, which a batch of one would be compared by, each channel with each."""
    objective = objective_for(build_aura())
    own = objective.denoise
    objective.denoise = lambda *given: own(*given).unsqueeze(2)
    samples, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([3])
    with pytest.raises(ValueError, match=r"AuraFlowObjective predicts \[1, 4, 1, 8, 8\] where the target is \[1, 4, "):
        objective.negative_elbo(objective.module, samples, objective.encode_prompts(["a"]), timesteps, samples)


def test_the_page_s_selections_select(registered):
    objective = objective_for(build_aura())
    text, image = (set(objective.select(name)) for name in ("xattn", "noxattn"))
    assert not text & image
    assert "joint_transformer_blocks.0.attn.add_k_proj.weight" in text
    assert {"pos_embed.proj.weight", "joint_transformer_blocks.0.ff.linear_1.weight"} <= image


def test_the_page_names_every_method_and_no_other():
    """Of what a family inherits; what it is asked for is an attribute of the file, or a row."""
    text = PAGE.read_text()
    named = {name for line in text.splitlines() if line.startswith("| `")
             for name in re.findall(r"`(\w+)`", line.split("|")[1])}  # fmt: skip
    named |= set(re.findall(r"^    def (\w+)", text, flags=re.MULTILINE)) - {"_embeddings"}
    there = set()
    for kind in (TextToImageObjective, DiffusionObjective, FlowObjective, Objective):
        there |= {name for name, value in inspect.getmembers(kind)
                  if name[0] != "_" and (isinstance(value, (FunctionType, MethodType, property)))}  # fmt: skip
    # Of the path alone.
    assert there - {"noise_schedule", "zero_terminal_snr"} == named
