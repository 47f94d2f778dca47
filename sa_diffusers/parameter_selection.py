"""Which parameters of a model are trained."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping

# The standard library's own can neither be stopped nor left alone.
import regex
from torch import nn

from .messages import shown, shown_error

# Cross-attention, and the paper's nudity experiment: everything but cross-attention, the time embedding and the output
# block.
UNET_SELECTIONS = {
    "xattn": r"\.attn2\.",
    "noxattn": r"^(?!.*\.attn2\.)(?!time_embedding\.)(?!conv_norm_out\.)(?!conv_out\.)",
}
# What the names mean for a bare module; a family may have meanings of its own (`Family.selections`).
_OF_MODULES = {"UNet2DConditionModel": UNET_SELECTIONS}
PRESETS = ("full", "xattn", "noxattn")
# What peers train of transformers without cross-attention; a family says what each means for it, if anything.
PEER_PRESETS = ("text_qk", "joint_kv", "image_kv", "attention", "text_embedding")
# Milliseconds do for the names of the largest models.
_SECONDS = 10.0


def select_parameters(
    module: nn.Module, selection: str, meanings: Mapping[str, str] | None = None
) -> dict[str, nn.Parameter]:
    """Name the parameters that a selection means.

    Args:
        module: The denoiser (or any module).
        selection: `"full"` (every parameter), `"xattn"` (cross-attention only), `"noxattn"` (unconditional layers:
            all but cross-attention, the time embedding and the output block; paper, section 4.2 and appendix B.2), a
            name of `PEER_PRESETS`, or a regular expression that is searched in parameter names.
        meanings: Selection -> regular expression, for those that have a name. Default: what they mean for modules of
            this class.

    Returns:
        Name and parameter, in the module's order. Nothing is changed in the module.

    Raises:
        ValueError: The preset does not exist for this kind of module, the expression is not valid or takes too long, or
            nothing matches.
    """
    kind = type(module).__name__
    names = [name for name, _ in module.named_parameters()]
    if meanings is None:
        meanings = _OF_MODULES.get(kind, {})
    known = ", ".join({"full": "", **meanings})
    if selection in (*PRESETS, *PEER_PRESETS) and selection not in {"full", *meanings}:
        raise ValueError(
            f'train_method="{selection}" has no meaning for {kind}. Use one of {known}, or a regular expression on its '
            f"parameter names, such as {_examples(names)}"
        )
    pattern = "" if selection == "full" else meanings.get(selection, selection)
    try:
        compiled = regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(
            f'train_method="{shown(selection)}" is not one of {known}, nor a valid regular expression '
            f"({shown_error(error)})"
        ) from None
    until = time.monotonic() + _SECONDS
    try:
        selected = {
            name: parameter for name, parameter in module.named_parameters()
            if compiled.search(name, timeout=max(until - time.monotonic(), 0.0))
        }  # fmt: skip
    except TimeoutError:
        raise ValueError(
            f'train_method="{shown(selection)}" takes more than {_SECONDS:g} seconds on {len(names)} parameter names, '
            "as expressions do that repeat a repetition: write a simpler one, or the parts of names joined by |"
        ) from None
    if not selected:
        raise ValueError(
            f'train_method="{shown(selection)}" matches no parameter of {kind}. Use one of {known}, or a '
            f"regular expression on its {len(names)} parameter names, such as {_examples(names)}"
        )
    return selected


def _examples(names: list[str]) -> str:
    step = max(1, len(names) // 4)
    return ", ".join(names[::step][:4])


@contextlib.contextmanager
def only_trainable(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Require gradients for the named parameters alone; on leaving, every flag is as it was."""
    wanted = set(names)
    before = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    try:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in wanted)
        yield
    finally:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(before[name])


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode meanwhile; afterwards each module has its mode again."""
    modes = [(module, module.training) for module in modules]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, mode in modes:
            module.train(mode)


@contextlib.contextmanager
def recomputing(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing meanwhile, if it is wanted; a module that does so of itself goes on."""
    begins = wanted and not getattr(module, "is_gradient_checkpointing", False)
    if begins:
        module.enable_gradient_checkpointing()  # type: ignore[operator]
    try:
        yield
    finally:
        if begins:
            module.disable_gradient_checkpointing()  # type: ignore[operator]
