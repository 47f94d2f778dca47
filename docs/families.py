"""Write `docs/families.md` from the families themselves, and from the configurations of real denoisers.

python docs/families.py
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
from accelerate import init_empty_weights

from sa_diffusers.configuration import SelectiveAmnesiaConfig
from sa_diffusers.families import (
    Flux2KleinObjective,
    FluxObjective,
    LatentDiffusionObjective,
    QwenImageObjective,
    SanaObjective,
    StableDiffusion3Objective,
    StableDiffusionXLObjective,
    TextToImageObjective,
    ZImageObjective,
    distilled,
    registry,
)
from sa_diffusers.families.flow import FlowObjective
from sa_diffusers.families.stable_diffusion import UNetObjective
from sa_diffusers.parameter_selection import PEER_PRESETS, PRESETS, select_parameters
from sa_diffusers.stages.subject import hands_to_xformers

CONFIGURATIONS = Path(__file__).with_name("configurations")
# Float32 numbers that training keeps of each trained parameter beside its value, by default: gradient, four of Prodigy,
# the average, theta* and the Fisher information.
KEPT = 1 + 4 + 1 + 1 + 1


class Base(NamedTuple):
    """A published base model: its family, and on what terms its owner gives it."""

    family: type[TextToImageObjective]
    name: str
    licence: str


BASES = {
    "stable-diffusion-v1-4": Base(LatentDiffusionObjective, "CompVis/stable-diffusion-v1-4", "CreativeML OpenRAIL-M"),
    "stable-diffusion-2-1-base": Base(
        LatentDiffusionObjective, "stabilityai/stable-diffusion-2-1-base", "CreativeML OpenRAIL++-M; no longer offered "
        "by its owner"
    ),
    "stable-diffusion-xl-base-1.0": Base(
        StableDiffusionXLObjective, "stabilityai/stable-diffusion-xl-base-1.0", "CreativeML OpenRAIL++-M"
    ),
    "stable-diffusion-3-medium": Base(
        StableDiffusion3Objective, "stabilityai/stable-diffusion-3-medium-diffusers", "Stability AI Community; gated"
    ),
    "stable-diffusion-3.5-medium": Base(
        StableDiffusion3Objective, "stabilityai/stable-diffusion-3.5-medium", "Stability AI Community; gated"
    ),
    "stable-diffusion-3.5-large": Base(
        StableDiffusion3Objective, "stabilityai/stable-diffusion-3.5-large", "Stability AI Community; gated"
    ),
    "FLUX.1-dev": Base(FluxObjective, "black-forest-labs/FLUX.1-dev", "FLUX.1 dev, non-commercial; gated"),
    "Z-Image": Base(ZImageObjective, "Tongyi-MAI/Z-Image", "Apache 2.0"),
    "Sana_1600M_1024px": Base(
        SanaObjective, "Efficient-Large-Model/Sana_1600M_1024px_diffusers", "NVIDIA License, non-commercial"
    ),
    "Qwen-Image": Base(QwenImageObjective, "Qwen/Qwen-Image", "Apache 2.0"),
    "FLUX.2-klein-base-4B": Base(Flux2KleinObjective, "black-forest-labs/FLUX.2-klein-base-4B", "Apache 2.0"),
    "FLUX.2-klein-base-9B": Base(
        Flux2KleinObjective, "black-forest-labs/FLUX.2-klein-base-9B", "FLUX, non-commercial; gated"
    ),
}  # fmt: skip
FAMILIES = list(dict.fromkeys(base.family for base in BASES.values()))
CONDITIONS = {
    LatentDiffusionObjective: "CLIP's hidden states (77 tokens)",
    StableDiffusionXLObjective: "two CLIPs' hidden states (77 tokens), pooled embedding of the second; sizes: the "
    "image's own, not cut",
    StableDiffusion3Objective: "hidden states of two CLIPs (77 tokens) and, behind them, T5 (256), the CLIPs' pooled "
    "embeddings; T5 may be absent (`--no_t5`)",
    FluxObjective: "T5's hidden states (512 tokens), CLIP's pooled embedding, guidance as a number "
    f"({FluxObjective.embedded_guidance:g})",
    ZImageObjective: "Qwen3's hidden states, as many as a prompt has tokens in the chat template (512 at most)",
    SanaObjective: "Gemma's hidden states (300 tokens) of the prompt behind the pipeline's instruction to enhance it",
    QwenImageObjective: "Qwen2.5-VL's hidden states, as many as a prompt has tokens (512 at most)",
    Flux2KleinObjective: "hidden states of three layers of Qwen3 (512 tokens, padding among them)",
}
EMPTY = {
    LatentDiffusionObjective: "the words of the empty prompt",
    StableDiffusionXLObjective: "zeros, where the pipeline says `force_zeros_for_empty_prompt`, as SDXL's does",
    StableDiffusion3Objective: "the words of the empty prompt",
    FluxObjective: "the words of the empty prompt, with classifier-free guidance",
    ZImageObjective: "the words of the empty prompt",
    SanaObjective: "the empty prompt, without the instruction",
    QwenImageObjective: "a space, as its authors do; the result is scaled to the length that it has without",
    Flux2KleinObjective: "the words of the empty prompt",
}
SCRIPTS = {
    LatentDiffusionObjective: "train_text_to_image.py",
    StableDiffusionXLObjective: "train_text_to_image_sdxl.py",
    StableDiffusion3Objective: "train_dreambooth_lora_sd3.py",
    FluxObjective: "train_dreambooth_lora_flux.py",
    ZImageObjective: "train_dreambooth_lora_z_image.py",
    SanaObjective: "train_dreambooth_lora_sana.py",
    QwenImageObjective: "train_dreambooth_lora_qwen_image.py",
    Flux2KleinObjective: "train_dreambooth_lora_flux2_klein.py",
}
HEAD = """\
# Families

Written by `python docs/families.py` from the families themselves. None of these models' own weights has been trained
here yet; `tests/test_every_family.py` takes a tiny model of each one's real classes through the same steps.
[new-family.md](new-family.md) shows how one is written.
"""
SIBLINGS = """\
An erasure from a sibling (image to image, inpainting by the same network, ControlNet) is one from the pipeline of its
parts that draws from a prompt alone, and that is what is saved: `from_pipe` of diffusers makes the sibling of it again.
Networks with further channels are refused: those of inpainting checkpoints take a mask and the masked picture beside
the latents (9 channels in Stable Diffusion), others outlines or a depth, and surrogates, replay and Fisher samples are
drawn from prompts, which give none of these. Erase from the text-to-image model that such a one came from. Models
that edit a picture (FLUX.1 Kontext, Qwen-Image-Edit), SDXL's refiner, Sana Sprint and schedulers whose noise is not
known (EDM) are refused too.
"""
LOADED = """\
## What is loaded, and what is saved

A base model is a folder, or a name on the Hub, as diffusers has them: weights whole or in shards with an index, plain
or of a variant (`--variant fp16`; where there is only one variant, that one), read as float32, or as `--weights_dtype`
says. What is saved is such a folder too, in that precision, and plain diffusers loads it; or, with
`--save_components trained`, what was trained alone ([publishing.md](publishing.md)).

A single file (`.safetensors`) does as well. Its configurations and tokenizers are those of a pipeline of the same kind:
of `--single_file_config`, a folder or a name on the Hub, or else of the one that diffusers tells by the file's tensors,
from the Hub or its local cache. A file with autoencoder and text encoders in it is read by the `from_single_file` of
its pipeline (Stable Diffusion, SDXL, Stable Diffusion 3, FLUX.1); one that holds the denoiser alone, as most of FLUX
do, or with an autoencoder, as those of Stable Diffusion 3 and 3.5 do, by those of their classes. What a file lacks
comes from the pipeline that lends the configurations, which must then be there as a whole.
`hf download black-forest-labs/FLUX.1-dev` once, and no connection is needed any more:

```
accelerate launch examples/train_sa.py --pretrained_model_name_or_path tuned.safetensors \\
    --single_file_config black-forest-labs/FLUX.1-dev --concept "Brad Pitt" --surrogate "a middle aged man"
```

Some files need the flag: by their tensors diffusers takes Z-Image for Z-Image-Turbo, FLUX.2 klein for FLUX.2 dev, and
Stable Diffusion 2 base for 2.1, which predicts v and not the noise; Qwen-Image it does not know.

Pickles (`.ckpt`, `.pt`, `.bin` in one file) are refused: reading one may run code. `tests/test_user_command.py` runs
the command on each family in the layout of its best-known repository; `tests/test_single_file.py` reads tiny
checkpoints of Stable Diffusion 1, SDXL, Stable Diffusion 3 and Z-Image as their authors' programs name the tensors, and
transformers of the other families under diffusers' own names. Files of FLUX.1, which diffusers splits by the real size,
of Sana and FLUX.2 klein under their authors' names have not been tried.
"""
FASTER = """\
## Faster, or in less memory

`tests/test_acceleration.py` takes a forward and a backward pass of each family's tiny model with each of these.

- `--gradient_checkpointing`: the same gradient, in each family.
- Kernels of PyTorch's attention (flash, memory-efficient, plain): PyTorch chooses by itself, and there is no flag. The
  plain one and the CPU's flash one give the same gradient in each family.
- `set_attention_backend` of diffusers, from Python: what a pipeline in memory was set to is kept. Tried with the plain
  kernel, which keeps matrices of all places by all places: memory is counted as the fused kernels take it, and such a
  choice takes more than a plan says.
- `--use_8bit_adam` needs bitsandbytes, and a learning rate. Tried with 0.50.2 on a CPU: each family trains, and goes on
  from a checkpoint to the same bits. A step of it is taken before any work; where that fails, the run is refused.
- `--enable_xformers_memory_efficient_attention` needs xformers and a CUDA device. It is refused where one is missing,
  where the denoiser has no attention that diffusers hands to xformers, and where diffusers would put plain attention in
  place of the model's own, which computes another thing (Z-Image's turned places, Sana's linear attention, Qwen-Image's
  two streams). Tried with PyTorch's attention in the place of xformers' kernel; no run with xformers has been made.

diffusers hands the attention of these to xformers: {handed}.
"""
GUIDANCE = f"""\
FLUX.1 dev takes guidance as a number, {FluxObjective.embedded_guidance:g} in sampling, training, replay, probes and
Fisher information alike: what is trained is what is used. Others train with 1 or 3; there is no consensus.
`--guidance_scale` is classifier-free guidance, which it does not need: above 1 it is the pipeline's `true_cfg_scale`,
at twice the cost.

`--guidance_scale` has one meaning here, the usual one: 1 is without guidance. Z-Image's pipeline counts from 0, so that
its 5 is 6 here, and it is called with one less than is given. Qwen-Image's pipeline calls it `true_cfg_scale` and needs
`negative_prompt=" "` beside it, as the card says; FLUX.2 klein's takes the prompt by its name only.

Sana comes with a scheduler of DPM-Solver++ whose `flow_shift` diffusers' script does not read: the noise is trained on
without a shift and sampled with one (`flow_dpmsolver++`, the pipeline's own; `flow_euler` takes the same shift). With a
`FlowMatchEulerDiscreteScheduler` its shift holds for both. The pipeline's `use_resolution_binning` draws an image that
is smaller than the model's own at the model's own size and shrinks it; here `--resolution` is the size that is drawn
and trained, so call the pipeline with `use_resolution_binning=False` to see what was evaluated, if it is another.

Samples of Z-Image and of FLUX.2 klein are the most likely latents of an image, as in their scripts, where the others'
are drawn from the autoencoder's posterior; Sana's autoencoder has none.

Without T5 (`--no_t5`) Stable Diffusion 3 is sampled, trained and saved without, and its folder loads by
`DiffusionPipeline.from_pretrained(FOLDER, tokenizer_3=None, text_encoder_3=None)`. What was forgotten so was forgotten
under the two CLIPs' words alone: with a T5 beside them the concept may be back.
"""
SIZES = """\
## Sizes

Parameters of the denoiser, counted on models without weights; their configurations, in `docs/configurations`, were
written down by hand from what is known of the publishers' files. The memory is that of the denoiser and of what
training keeps, all in float32; activations and text encoders come on top, and [memory.md](memory.md) has them all. By
default eight further numbers are kept of a trained parameter (gradient, Prodigy's four, average, theta\\*, Fisher
information).
"""
DISTILLED = """\
## Distilled models

A model that is distilled to few steps is refused, with the name of the base to train in its place: ordinary training
takes the few steps from it. It is told by its name (that of the folder or on the Hub, or the one that its index holds)
and by its configuration: a FLUX.1 transformer that takes no guidance, `is_distilled` in the index of FLUX.2 klein, the
shift of Z-Image-Turbo's scheduler, the scheduler of SDXL-Turbo, that of latent consistency models, a UNet that takes
guidance as a number. Sana Sprint and models with a scheduler of TCD are refused in any case.

`--train_distilled` trains it all the same; of a model that nothing else tells, it says that it is distilled. Plan,
report and card then name it so, and so does `sa-diffusers evaluate`. What comes of it is to be judged at the few steps
of its use, and surrogates, replay, previews and pictures of evaluations are all sampled so, unless other settings are
given:
"""
USED = """\
All without guidance (`--guidance_scale 1`), as their publishers say. A number in a name ("8step") is the number of
steps. Transformers have their family's sampler in any case. Where nothing but `--train_distilled` tells, sampler, steps
and guidance are the family's own, and `--num_inference_steps` and `--guidance_scale` say others. Z-Image-Turbo's own
page says nine steps: before diffusers 0.40 the ninth took no noise away.

FLUX.1-schnell reads 256 tokens of T5, FLUX.1 dev 512: plain diffusers takes `max_sequence_length=256` for it. UNets
that take guidance as a number (latent consistency models) are given it in training, replay, probes, Fisher information
and sampling alike, {guidance:g}, and have no guidance beside it.

Whether an erasure of a distilled model keeps its few steps has not been measured here.
"""
LOSSES = """\
## Which losses bound the ELBO

The paper's argument is about the ELBO. Kingma and Gao (*Understanding diffusion objectives as the ELBO with simple data
augmentation*, 2023) show that a weighted loss of diffusion is, up to a constant, a bound on the ELBO of noised data if
the weight of the noise's error over log-SNR nowhere falls as the noise grows. With `s` the share of noise, `p(s)` the
density and `v(s)` the weight of the velocity's error, that weight is `p(s) v(s) s / (1 - s)`:

| density and weight | bounds the ELBO |
| --- | --- |
| uniform, no weight, with any static shift from 1 on | yes |
| logit-normal, no weight | no: it falls towards pure noise |
| logit-normal, weighted by the square of the noise's share | no, for the same reason |
| noise prediction, unweighted (Stable Diffusion 1 and 2, SDXL) | no; the reweighted ELBO of the paper's section 2.1 |

Each family trains the loss of its published script, and the Fisher information and the probes take the same:
its strata hold equal shares of the density, and over all timesteps (`--fisher_timesteps 0`) each timestep counts as
often as it would be drawn. The one choice is Stable Diffusion 3's: it was trained without a weight, and diffusers'
script fine-tunes it with the square of the noise's share, which is taken here. On a small model of its classes the two
erased alike ([figures](../benchmarks/README.md)), so that nothing speaks against the script's; at the real size it has
not been measured.
"""
MEANINGS = [
    ["Stable Diffusion 1 and 2, SDXL", "cross-attention: `attn2`",
     "all but cross-attention, time embedding and output block"],
    ["Stable Diffusion 3 and 3.5", "what projects the text's stream into the joint attention and out of it: "
     "`add_q_proj`, `add_k_proj`, `add_v_proj`, `to_add_out`, their norms", "the image's own stream: its projections, "
     "its feed-forward layers, `attn2` of 3.5 medium, the patches"],
    ["FLUX.1 dev, FLUX.2 klein", "the same, of the double blocks",
     "the image's stream of the double blocks, the patches"],
    ["Qwen-Image", "the same, of all blocks", "the image's own stream, the patches"],
    ["Z-Image", "what sees the text alone: `cap_embedder`, `context_refiner`, the token that pads texts",
     "what sees the image alone: the patches, `noise_refiner`, the token that pads images"],
    ["Sana", "cross-attention: `attn2`", "the rest of the blocks, the patches"],
]  # fmt: skip
# Of the others the shift goes by the resolution, and is for sampling alone.
SHIFTED = {
    StableDiffusion3Objective: "",
    ZImageObjective: " (6)",
    SanaObjective: ", where it is one of Euler's",
}
# Preset -> what it trains, and who does so.
PEERS = {
    "text_qk": ("queries and keys of the text's stream", "EraseAnything, on FLUX.1"),
    "joint_kv": ("keys and values of both streams, where each has its own", "an ESD for FLUX.2 klein, strict"),
    "image_kv": ("keys and values of the image's stream and of single streams", "ESD-FLUX, strict"),
    "attention": ("all projections of attention, single streams included", "ESD-FLUX x, an ESD for SD 3.5"),
    "text_embedding": ("what embeds the text as a whole, and the pooled text", "UCE, on FLUX.1"),
}
SELECTIONS = """\
Transformers of two streams have no cross-attention, and there is no agreement on what stands for it. In neither
selection are what embeds text as a whole (`context_embedder`, the pooled embedding), the modulation of norms, which
depends on the prompt as well as on time, the text's feed-forward layers, and the output. FLUX's single blocks have one
set of weights for text and image: what they do to the text alone cannot be selected by parameters, and training them
trains both; a regular expression such as `^single_transformer_blocks\\.` does. In the last block of Stable Diffusion 3
the text goes nowhere: its query has no gradient and stays as it was. So it is in Qwen-Image, whose last block has an
output of the text besides.
"""
PEER_SELECTIONS = """\
Peers train other parts in the name of cross-attention. These are names that `--train_method` takes too, with the
parameters that each selects; the names are ours, and which of them forgets best has not been measured here.
"""
SHARED = """\
What cannot be had by selecting parameters: where one set of weights serves text and image, what it does to the text
alone. That is so in `layers` of Z-Image (88 % of its parameters) and in the single blocks of FLUX.1 and FLUX.2 klein.
`image_kv` and `attention` train such weights, and with them what they do to the other stream: Z-Erase reports that
methods made for two streams make generation collapse where all is shared, and updates what text tokens see, by a mask
in the forward pass, which is not offered. In FLUX.2 klein's single blocks one matrix holds queries, keys, values and
the feed-forward layer, so that keys and values alone (`image_kv`) cannot be told; `attention` takes the matrix whole.
A regular expression such as `^layers\\.` or `^single_transformer_blocks\\.` trains all of it.
"""


@functools.cache
def denoiser(name: str) -> Any:
    """A denoiser of the real size, without its weights."""
    settings = json.loads((CONFIGURATIONS / f"{name}.json").read_text(encoding="utf-8"))
    kind = getattr(diffusers, settings.pop("_class_name"))
    with init_empty_weights():
        return kind.from_config(settings)


def counts(name: str) -> dict[str, int]:
    """Selection -> parameters that it trains of a base model."""
    module, meanings = denoiser(name), BASES[name].family.selections
    return {each: sum(value.numel() for value in select_parameters(module, each, meanings).values())
            for each in PRESETS}  # fmt: skip


def shares(preset: str) -> dict[str, str]:
    """Transformer -> parameters that a preset selects of it, and which share of all; of families without it nothing."""
    found = {}
    for name in ("stable-diffusion-3.5-large", "FLUX.1-dev", "Qwen-Image", "FLUX.2-klein-base-4B", "Z-Image"):
        meanings = BASES[name].family.selections
        if preset in meanings:
            module = denoiser(name)
            selected = sum(value.numel() for value in select_parameters(module, preset, meanings).values())
            found[name] = f"{selected:,} ({selected / sum(value.numel() for value in module.parameters()):.1%})"
        else:
            found[name] = "-"
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def path_of(family: type[TextToImageObjective]) -> list[str]:
    """Prediction, density and weight, as the family's own attributes say."""
    if not issubclass(family, FlowObjective):
        return ["noise or v, as the scheduler says", "uniform over its betas", "none; `--snr_gamma`"]
    density = {"uniform": "uniform", "logit_normal": "logit-normal (0, 1)"}[family.density]
    weights = {None: "none", "sigma_squared": "the square of the noise's share"}
    shift = f", through the scheduler's static shift{SHIFTED[family]}" if family in SHIFTED else ""
    return ["velocity, noise - sample", density + shift, weights[family.weighting]]


def sampled(family: type[TextToImageObjective]) -> str:
    fields = SelectiveAmnesiaConfig.__dataclass_fields__
    names = ("sampler", "num_inference_steps", "guidance_scale")
    sampler, steps, guidance = (family.defaults.get(name, fields[name].default) for name in names)
    return f"`{sampler}`, {steps} steps, guidance {guidance:g}"


def pages() -> Iterator[str]:
    yield HEAD
    known = {family: [f"`{name}`" for name, its in registry._FAMILIES.items() if its is family] for family in FAMILIES}
    yield table(
        ["family", "pipelines", "conditions", "what guides"],
        [[family.title, ", ".join(known[family]), CONDITIONS[family], EMPTY[family]] for family in FAMILIES],
    )
    yield SIBLINGS
    yield table(
        ["family", "predicted", "density of timesteps", "weight", "as in diffusers'", "sampled by default"],
        [[family.title, *path_of(family), f"`{SCRIPTS[family]}`", sampled(family)] for family in FAMILIES],
    )
    yield LOADED
    yield GUIDANCE
    yield LOSSES
    yield "## What the selections mean\n"
    yield table(["family", "`xattn`", "`noxattn`"], MEANINGS)
    yield SELECTIONS
    yield PEER_SELECTIONS
    parts = {preset: shares(preset) for preset in PEER_PRESETS}
    yield table(
        ["`--train_method`", "what is trained", "by", *(f"`{BASES[name].name}`" for name in parts["attention"])],
        [[f"`{preset}`", *PEERS[preset], *parts[preset].values()] for preset in PEER_PRESETS],
    )
    yield SHARED
    yield SIZES
    rows = []
    for name in BASES:
        found = counts(name)
        least = [4 * (found["full"] + KEPT * found[each]) / 1e9 for each in PRESETS]
        both = [f"{found[each]:,} ({size:,.0f} GB)" for each, size in zip(PRESETS, least, strict=True)]
        rows.append([f"`{BASES[name].name}`", *both, BASES[name].licence])
    yield table(["base model", *(f"`{each}`" for each in PRESETS), "licence"], rows)
    handed = [base.family.title for name, base in BASES.items() if hands_to_xformers(denoiser(name))]
    yield FASTER.format(handed=", ".join(dict.fromkeys(handed)))
    yield DISTILLED
    yield table(
        ["told to be, or named", "steps", "sampler", "to train in its place"],
        [[use.title, str(use.steps), f"`{use.sampler}`" if use.sampler else "the family's",
          f"`{use.base}`" if use.base else "the family's"] for use in distilled.USES],
    )  # fmt: skip
    yield USED.format(guidance=UNetObjective.embedded_guidance)


def text() -> str:
    return "\n".join(pages())


if __name__ == "__main__":
    Path(__file__).with_name("families.md").write_text(text(), encoding="utf-8")
