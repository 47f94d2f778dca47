"""Write `docs/memory.md`: what training takes of a GPU, counted on models of the real sizes without weights.

python docs/memory.py
"""

import inspect
import json
import runpy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from sa_diffusers import SelectiveAmnesiaConfig
from sa_diffusers.families.flow import FlowObjective
from sa_diffusers.footprint import bytes_of
from sa_diffusers.parameter_selection import PRESETS
from sa_diffusers.training.memory import Memory, blank_of, in_use_bytes, training_memory

HERE = Path(__file__).parent
FAMILIES = runpy.run_path(str(HERE / "families.py"))
BASES, table = FAMILIES["BASES"], FAMILIES["table"]
PARTS = json.loads((HERE / "parts.json").read_text(encoding="utf-8"))
WEIGHTS = ("float32", "bfloat16")
GPUS = (12, 16, 24, 80)
# What CUDA itself and gaps between tensors take of a GPU.
LEFT = 0.1
# What keeps the least of each trained parameter; the learning rate itself is of no consequence for memory.
LEAN = {"learning_rate": 1e-5, "use_8bit_adam": True, "use_ema": False, "fisher_dtype": "bfloat16"}
HEAD = """\
# Memory

Written by `python docs/memory.py`, which runs a forward and a backward pass of each model at its real size on tensors
without values, and adds up what is alive at the peak (`sa_diffusers/footprint.py`). The configurations are those of
`docs/configurations` and `docs/parts.json`, written down by hand. The plan of a run prints the same estimate for its
own model and settings before anything is on the device, and names the flag that would make it fit where it does not.

Checked against torch's own record of its allocator (`tests/test_memory.py`): whole trainings of tiny models of every
family on a CPU take what is said within a tenth in float32. In bfloat16 they take up to three tenths less, because what
is counted is what CUDA casts to float32 in norms, and a CPU does not. None of this has been measured on a GPU yet.
"""
READING = f"""\
GB are of 10^9 bytes. Sizes are those of the model's own images, one image of the surrogate and one of replay in a pass
(`--train_batch_size 1`), the default optimiser (Prodigy) and the average of the weights. Prompts are the longest that
the model reads: Z-Image and Qwen-Image, which read no padding, take less of shorter ones. `network` is all of the
denoiser, what is trained of it in float32; gradients, optimiser, average, theta\\* and Fisher information are of what
is trained. The teacher (`--target frozen`) is the same network called with theta\\*: it takes nothing more.
Activations are given without and with `--gradient_checkpointing`; bfloat16 is `--weights_dtype bfloat16`, with mixed
precision. The largest batches (`--train_batch_size`) are with gradient checkpointing, and leave a tenth of the GPU to
CUDA itself and to gaps; a dash means that one image does not fit, or that the text encoders do not fit by themselves.
What is sampled and what the Fisher information takes in batches is cut in half as often as it takes to fit.
`lean` is with what keeps least of each trained parameter:
`{" ".join(f"--{name} {value}" if value not in (True, False) else f"--{'' if value else 'no-'}{name}"
           for name, value in LEAN.items())}`.
"""  # fmt: skip
# How a base is held that an adapter of this rank is trained on; of the last three the rest is bfloat16.
HELD = (*WEIGHTS, "int8", "fp8", "nf4")
RANK = 8
TIMESTEPS = SelectiveAmnesiaConfig(concept="a", surrogate="b").fisher_timesteps
ADAPTERS = f"""\
## Adapters

`--adapter lora --lora_rank {RANK}` on the layers that are trained by default
([families.md](families.md)); the rest is as above, with gradient checkpointing. `int8`, `fp8` and `nf4` are
`--base_quantization`, beside `--weights_dtype bfloat16`. The teacher is the network without the adapter: there is no
theta\\*. `adapter` is its matrices, their gradients, optimiser and average.

What is quantised is the denoiser's linear layers: to 8 bits with a scale in float32 for each row (torchao), or to 4
bits with a scale of 8 bits for each 64 numbers and one of 32 for each 256 of those, which are 4.127 bits a number
(Dettmers et al., 2023, section 3, as bitsandbytes has it). One layer at a time is dequantised for its products, forward
and backward; left to themselves, torchao's layers keep all of them dequantised until the backward pass, so that nothing
is saved.

Fisher information has a number for each selected weight, in float32. `to estimate it` is what its estimate takes before
training: the weights, twice as much as it, and the gradient of one of them; `rows by columns` beside it is what
`--fisher_form rows_by_columns` takes: the weights, and twice the gradient of one of them. What the passes hold comes on
top: half of the column `activations` for each timestep that they hold at once, which is one for the first
(`--fisher_batch_size` is halved where there is no room), and all of a sample's, {TIMESTEPS}, for the other
(`--fisher_timesteps`). The training itself then holds next to nothing of it. `--fisher_on_cpu` leaves the weights and
the gradient of one alone on the GPU, and what is twice as much as the column `Fisher` in the CPU's memory; each
backward pass then sends as many numbers there as are selected. What another machine has estimated from the same
quantised weights can be handed in (`--fisher`), and the term be left out (`--ewc 0`).
"""
FITTING = """\
The most exact way to hold the base that fits, and the largest batch of an adapter with it. `with the flag`: the
estimate of the Fisher information, or its diagonal, does not fit, and the batch is that with `--fisher_form
rows_by_columns`, of which the estimate may need fewer timesteps. Stable Diffusion 3 and 3.5 do not fit 12 GB for their
T5, in 16 bits; `--no_t5` leaves it out.
"""
IN_USE = """\
Text encoders and autoencoder rest on the CPU and are on the GPU only while prompts are embedded (once, before training)
and images encoded or decoded (samples before, images of checks and validation). Where text encoders find no room
beside the network (a tenth of what is free is left to what they compute), the network waits on the CPU meanwhile; the
plan says so. It comes back for every batch of images that is sampled, which takes seconds each time; this has not been
run on a GPU yet. The autoencoder works in float32 whatever the weights are held in, since some overflow otherwise; what
it takes of one image is counted in. What text encoders compute comes on top of their weights and is not counted, here
nor in a plan: of up to 16 prompts at a time the hidden states of all layers, and the logits of FLUX.2 klein's and
Qwen-Image's, which are some GB.
"""
HALF = """\
## Weights in half precision

`--weights_dtype bfloat16` (or `float16`, on CUDA) loads the base so and implies mixed precision of the same kind. What
is trained has float32 masters while it is, in which small updates add up; theta\\* is kept as it was loaded, which
loses nothing, and is what the frozen model is. At the end the masters are rounded: the output folder is of the
precision that the base was held in, and `DiffusionPipeline.from_pretrained(FOLDER, dtype=torch.bfloat16)` has exactly
those weights. Forward passes in mixed precision round the masters in the same way, so that probes measure what is
saved, but for norms. float16 loses gradients below its range, those of the Fisher information above all: take bfloat16
where the GPU has it. Samples, Fisher information and trained weights of one precision are not reused for another.

Fisher information is computed in float32 sums and kept so on disk; `--fisher_dtype bfloat16` holds it in half as much
memory while training, and `--fisher_on_cpu` in the CPU's memory, from where each weight's part comes to the GPU at
every step; its estimate then takes one weight's gradient beside the weights, and in the CPU's memory twice as much as
it. The last has not been run on a GPU yet. `fisher_config.json` says in what precision the passes ran and the weights
were held (`precision`, `weights_dtype`), and report and card say both.
"""


@cache
def blank(name: str) -> tuple[Any, tuple, int, int]:
    """A base model without weights, the shapes of a sample and of its conditions, bytes of text encoders and VAE."""
    parts, family = PARTS["bases"][name], BASES[name].family
    settings = json.loads((HERE / "configurations" / f"{name}.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        module, vae = made(diffusers, settings), made(diffusers, PARTS["vaes"][parts["vae"]])
        encoders = [made(transformers, PARTS["text_encoders"][one]) for one in parts["text_encoders"]]
        conditions = {one: torch.empty(1, *shape) for one, shape in parts["conditions"].items()}
    # Texts are as long as the model reads.
    conditions |= {one: torch.ones(conditions[one].shape) for one in family.lengths}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if issubclass(family, FlowObjective) else None
    given = {
        family.denoiser: module,
        "vae": vae,
        "scheduler": scheduler or diffusers.DDPMScheduler(clip_sample=False, steps_offset=1),
    }
    others = inspect.signature(family.sampled_by.__init__).parameters.values()
    given |= {one.name: None for one in others if one.default is one.empty and one.name not in {"self", *given}}
    options = {"safety_checker": None, "requires_safety_checker": False}
    objective = family(family.sampled_by(**given, **{k: v for k, v in options.items() if k in
                                                     {one.name for one in others} - given.keys()}))  # fmt: skip
    size = parts["resolution"]
    samples = objective.encode_images(torch.zeros(1, 3, size, size, device="meta"), 0)
    whole = sum(value.numel() for encoder in encoders for value in encoder.parameters())
    return objective, (samples, conditions), whole, bytes_of(vae.parameters())


def made(library: Any, settings: dict[str, Any]) -> torch.nn.Module:
    settings = dict(settings)
    kind = getattr(library, settings.pop("_class_name"))
    if library is diffusers:
        return kind.from_config(settings)
    return kind(kind.config_class(**settings))


def memory(name: str, selection: str, weights: str, counts_activations: bool = True, **settings: Any) -> Memory:
    config = SelectiveAmnesiaConfig(
        concept=["a"], surrogate=["b"], train_method=selection, weights_dtype=weights, train_batch_size=1,
        **settings,
    )  # fmt: skip
    objective, shapes, *_ = blank(name)
    return training_memory(objective, config, shapes, counts_activations=counts_activations)


def counted(name: str, selection: str, weights: str) -> dict[str, Memory]:
    """A batch of one image as it is, and with gradient checkpointing; and what keeps least of all."""
    return {
        "plain": memory(name, selection, weights),
        "one": memory(name, selection, weights, gradient_checkpointing=True),
        "lean": memory(name, selection, weights, counts_activations=False, **LEAN),
    }


def batches(found: dict[str, Memory], kept: int, encoding: int) -> str:
    """The largest batch that fits each GPU: each image takes what one alone does, or a little less."""
    one = found["one"]
    # The network makes room for text encoders, which else could not embed prompts.
    others = max(encoding, one.weights + one.decoding)
    room = [(1 - LEFT) * 1e9 * size for size in GPUS]
    fitting = [int((size - kept) // one.activations) if others <= size else 0 for size in room]
    return " / ".join(str(count) if count > 0 else "-" for count in fitting)


def row(name: str, selection: str, weights: str) -> list[str]:
    found = counted(name, selection, weights)
    plain, one, lean = found["plain"], found["one"], found["lean"].kept
    sizes = [plain.weights, plain.gradients, plain.optimizer, plain.average, plain.anchor, plain.fisher,
             plain.activations, one.activations, one.kept + one.activations]  # fmt: skip
    encoding = blank(name)[2] * getattr(torch, weights).itemsize
    return [
        selection, weights, *(f"{size / 1e9:.1f}" for size in sizes), batches(found, one.kept, encoding),
        f"{(lean + one.activations) / 1e9:.1f}", batches(found, lean, encoding),
    ]  # fmt: skip


@cache
def adapter_memory(name: str, held: str, counts_activations: bool = True, form: str = "diagonal") -> Memory:
    """Of an adapter's training with gradient checkpointing."""
    quantized = {} if held in WEIGHTS else {"base_quantization": held}
    return memory(
        name, BASES[name].family.adapted or "full", held if held in WEIGHTS else "bfloat16", counts_activations,
        adapter="lora", lora_rank=RANK, gradient_checkpointing=True, fisher_form=form, **quantized,
    )  # fmt: skip


def adapter_row(name: str, held: str) -> list[str]:
    # What is dequantised for its products is the same, however it is held, and so is Fisher information.
    counted = adapter_memory(name, held if held in WEIGHTS else "int8")
    one = counted
    sums = adapter_memory(name, held, False, "rows_by_columns").estimating
    if held not in (*WEIGHTS, "int8"):
        one = replace(adapter_memory(name, held, False), activations=counted.activations, decoding=counted.decoding)
    factored = replace(one, fisher=adapter_memory(name, "float32", False, "rows_by_columns").fisher)
    encoding = blank(name)[2] * getattr(torch, held if held in WEIGHTS else "bfloat16").itemsize
    cells = []
    for each in (one, factored):
        cells += [f"{(each.kept + each.activations) / 1e9:.1f}", batches({"one": each}, each.kept, encoding)]
    matrices = one.gradients // 4
    sizes = [one.weights - 4 * matrices, 4 * matrices + one.gradients + one.optimizer + one.average, one.activations,
             one.fisher, one.weights + one.estimating, one.weights + sums]  # fmt: skip
    return [held, *(f"{size / 1e9:.1f}" for size in sizes), *cells]


def holding(rows: Mapping[str, list[str]], size: int) -> str:
    """The first way to hold a base that fits a GPU: with all of the Fisher information, or with rows by columns."""
    place = GPUS.index(size)
    for diagonal, estimate, column in ((True, 5, -3), (False, 6, -1)):
        for held, cells in rows.items():
            count = cells[column].split(" / ")[place]
            # Each image of a batch is two rows.
            fitting = int(((1 - LEFT) * size - float(cells[estimate])) / (float(cells[3]) / 2))
            if count == "-" or fitting < 1:
                continue
            if diagonal:
                return f"{held}, batch {count}"
            fewer = "" if fitting >= TIMESTEPS else f" and `--fisher_timesteps {fitting}`"
            return f"{held}, batch {count}, with the flag{fewer}"
    return "-"


ADAPTER_COLUMNS = [
    "base held in", "network", "adapter", "activations", "Fisher", "to estimate it", "rows by columns", "total",
    "largest batch at " + " / ".join(map(str, GPUS)) + " GB", "rows by columns: total", "largest batch",
]  # fmt: skip
COLUMNS = ["trained", "weights", "network", "gradients", "optimiser", "average", "theta\\*", "Fisher", "activations",
           "with checkpointing", "total so", "largest batch at " + " / ".join(map(str, GPUS)) + " GB", "lean total",
           "lean batches"]  # fmt: skip


def pages() -> Iterator[str]:
    yield HEAD
    yield READING
    for name in BASES:
        yield f"## {BASES[name].name}\n"
        if name not in PARTS["bases"]:
            yield "Not counted: `docs/parts.json` does not say what its text encoders and autoencoder are.\n"
            continue
        yield table(COLUMNS, [row(name, each, weights) for each in PRESETS for weights in WEIGHTS])
    yield ADAPTERS
    fitting = []
    for name in (name for name in BASES if name in PARTS["bases"]):
        rows = {held: adapter_row(name, held) for held in HELD}
        yield f"### An adapter of {BASES[name].name}\n"
        yield table(ADAPTER_COLUMNS, list(rows.values()))
        # Of the two of 8 bits one is enough.
        ways = {held: cells for held, cells in rows.items() if held != "fp8"}
        fitting.append([f"`{BASES[name].name}`", *(holding(ways, size) for size in (12, 24))])
    yield "### What 12 GB and 24 GB can hold\n"
    yield FITTING
    yield table(["base model", "12 GB", "24 GB"], fitting)
    yield "## Text encoders and autoencoder\n"
    yield IN_USE
    rows = []
    for name in BASES:
        if name in PARTS["bases"]:
            *_, encoders, vae = blank(name)
            objective, shapes, *_ = blank(name)
            decoding = in_use_bytes(blank_of(objective), shapes)[1]
            rows.append([f"`{BASES[name].name}`", f"{4 * encoders / 1e9:.1f}", f"{2 * encoders / 1e9:.1f}",
                         f"{vae / 1e9:.1f}", f"{decoding / 1e9:.1f}"])  # fmt: skip
    yield table(["base model", "text encoders, float32 (GB)", "bfloat16", "autoencoder", "with one image"], rows)
    yield HALF


def text() -> str:
    return "\n".join(pages())


if __name__ == "__main__":
    Path(__file__).with_name("memory.md").write_text(text(), encoding="utf-8")
