"""A concept out of a pipeline in memory, in one call."""

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline

from .configuration import SelectiveAmnesiaConfig, check_names
from .erasure import Erasure
from .families import checked_pipeline, family_of, load_pipeline, modules_of, objective_for, pipeline_name
from .families.adapters import ADAPTER_FILE, load_adapter
from .families.fused import fuse_adapters, parts_with_adapters
from .parameter_selection import evaluating
from .results import Report


class Erased(NamedTuple):
    """What `erase` gives.

    Attributes:
        pipeline: The pipeline without the concept.
        report: What was measured before and after, with its verdict; None in all processes but the main one.
    """

    pipeline: DiffusionPipeline
    report: Report | None


def erase(
    pipeline: DiffusionPipeline | str,
    concept: str | Sequence[str],
    surrogate: str | Sequence[str] = (),
    *,
    inplace: bool = False,
    **settings: Any,
) -> Erased:
    """Make a pipeline forget a concept.

        pipeline, report = sa_diffusers.erase(pipeline, "Brad Pitt", "a middle aged man")
        print(report.verdict.line)

    Settings are taken, the later the stronger, from the defaults, from what the base model's own folder recommends, and
    from the call.

    Args:
        pipeline: In float32, or in what the setting `weights_dtype` says, of a kind that `objective_for` knows; or its
            folder or name on the Hub.
        concept: What to forget, one or several.
        surrogate: What it turns into: a prompt, a folder of images (a path with a slash), or `uniform_noise`.
        inplace: Change the given pipeline's weights. Else it stays as it is, and one of its parts is copied.
        settings: Any other field of `SelectiveAmnesiaConfig`. With an `output_dir` pipeline, report and pictures stay
            there; else nothing but the cache of samples is left on disk.

    Returns:
        The pipeline, in evaluation mode, and its report. With `adapter="lora"` the adapter is loaded into it, and can
        be switched on and off.

    Raises:
        TypeError: There is no such setting.
        ValueError: A setting is not allowed, or the pipeline is of an unknown kind, in half precision, or has adapters
            (with `fuse_adapters=True` those are fused into the weights first).
    """
    if "pretrained_model_name_or_path" in settings:
        raise ValueError("pretrained_model_name_or_path is the first argument of erase: leave it out")
    if isinstance(pipeline, (str, Path)):
        given = load_pipeline(
            str(pipeline),
            no_t5=bool(settings.get("no_t5")),
            undistilled=not settings.get("train_distilled"),
            single_file_config=settings.get("single_file_config"),
            weights_dtype=settings.get("weights_dtype", "float32"),
            base_quantization=settings.get("base_quantization"),
        )
    else:
        given = checked_pipeline(pipeline)
    name = pipeline_name(given)
    settings = {**settings, "pretrained_model_name_or_path": name, "concept": concept, "surrogate": surrogate}
    settings.setdefault("report_to", "none")
    with contextlib.ExitStack() as stack:
        if not settings.get("output_dir"):
            place = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            settings["output_dir"] = str(Path(place) / "erased")
        try:
            check_names(settings, "erase")
        except ValueError as error:
            raise TypeError(str(error)) from None
        config = SelectiveAmnesiaConfig(**settings).over_base_defaults()
        stack.enter_context(_as_it_was(given))
        parts = _changed_parts(given, config)
        erasure = Erasure(config, pipeline=_with_copies(given, parts))
        comparison = erasure.run()
        if comparison is not None:
            erasure.card_stage.run()
        if config.fuse_adapters and inplace:
            fuse_adapters(given)
        if config.adapter:
            # An evaluation has put it into the copy.
            adapted = given if inplace else _with_copies(given, parts)
            if config.fuse_adapters:
                fuse_adapters(adapted)
            load_adapter(objective_for(adapted), Path(config.output_dir) / ADAPTER_FILE)
            adapted.to(given.device)
        else:
            erased = load_pipeline(config.output_dir, weights_dtype=config.weights_dtype)
    report = comparison.report if comparison else None
    if config.adapter:
        return Erased(adapted, report)
    if not inplace:
        return Erased(erased.to(given.device), report)
    for part in parts:
        getattr(given, part).load_state_dict(getattr(erased, part).state_dict())
    return Erased(given, report)


def _changed_parts(pipeline: DiffusionPipeline, config: SelectiveAmnesiaConfig) -> list[str]:
    """What is trained, and what adapters are fused into."""
    if config.fuse_adapters and (bring := parts_with_adapters(pipeline)):
        family = family_of(type(pipeline).__name__)
        return list({*bring, *([family.denoiser] if hasattr(family, "denoiser") else [])})  # type: ignore[union-attr]
    module = objective_for(pipeline, weights_dtype=config.weights_dtype).module
    return [name for name, part in pipeline.components.items() if part is module]


def _with_copies(pipeline: DiffusionPipeline, parts: Sequence[str]) -> DiffusionPipeline:
    """The same pipeline, with copies of some of its parts."""
    own = copy.copy(pipeline)
    for part in parts:
        setattr(own, part, copy.deepcopy(getattr(pipeline, part)))
    return own


@contextlib.contextmanager
def _as_it_was(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Samples are those of evaluation mode; modes, gradients and device are the caller's again afterwards."""
    modules, device = modules_of(pipeline), pipeline.device
    gradients = [(value, value.requires_grad) for module in modules for value in module.parameters()]
    try:
        with evaluating(*modules):
            yield
    finally:
        for value, wanted in gradients:
            value.requires_grad_(wanted)
        pipeline.to(device)
