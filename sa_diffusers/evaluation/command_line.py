"""From the settings of an evaluation to a report."""

import contextlib
import importlib
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..configuration import CONFIG_NAME, EvaluationConfig, SelectiveAmnesiaConfig
from ..data.classes import pair_classes
from ..data.concepts import pair_concepts
from ..data.sensitive import must_blur
from ..environment import launched
from ..families import SUPPORTED_PIPELINES, Objective, SamplingSettings, kind_in, load_pipeline, objective_for
from ..families.adapters import find_adapter, hold_quantized, with_adapter
from ..families.names import resolved_revision
from ..files import check_writable
from ..hub import one_line
from ..markup import visible
from ..output_folder import OutputFolder, check_written, weights_in
from ..processes import warn_once
from ..publish import write_model_card
from ..quantization import check_quantization
from ..report import PAGE_NAME
from ..report.terminal import format_report
from ..results import Report
from ..seeds import STREAMS
from .erased import (
    adapter_on_record,
    distilled_on_record,
    erasure_settings,
    recorded_ending,
    saved_alone,
    takes_classes,
    warn_of_another_base,
)
from .memory import batch_size_for
from .registry import MEASURES, PROTOCOLS
from .request import Evaluation, Request, erasure_of
from .subject import Subject

__all__ = ["PROTOCOLS", "Evaluation", "erasure_of", "run"]


Loader = Callable[[str, str], Objective]


def check_request(args: EvaluationConfig, config: SelectiveAmnesiaConfig, load: Loader) -> None:
    """What can be refused before anything is loaded, whatever the protocol.

    Raises:
        ValueError: A measure has no such name, a model is not there, the protocol needs another kind of model, or the
            precision needs another device.
    """
    for name in args.measures:
        MEASURES[name]
    if find_adapter(args.base, config.revision) is not None:
        raise ValueError(f"--base {args.base} holds an adapter: give the model that it was trained on")
    kinds = {
        "base": takes_classes(args.base, config.revision),
        "erased": takes_classes(args.erased, args.erased_revision),
    }
    for role, kind in kinds.items():
        revision = config.revision if role == "base" else args.erased_revision
        if kind is None and find_adapter(getattr(args, role), revision) is None:
            # There is no such model: loading it says what is wrong.
            load(role, getattr(args, role))
    if PROTOCOLS[args.protocol].takes == "prompts" and kinds["base"]:
        other = "; this one knows classes: take class" if args.protocol in ("concept", "robustness") else ""
        raise ValueError(f"the {args.protocol} protocol needs a model that takes prompts{other}")
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError(
            'mixed_precision="fp16", as in the erasure or as given, needs a CUDA device and there is none: give '
            "--mixed_precision bf16 or --mixed_precision no"
        )
    if config.base_quantization is not None:
        try:
            check_quantization(config.base_quantization, torch.cuda.is_available())
        except ValueError as error:
            raise ValueError(
                f"{args.erased} is measured on the base model quantised as in the erasure, or as given: {error}; "
                "--base_quantization none measures it on the base model in its own precision"
            ) from error


def loader(args: EvaluationConfig, config: SelectiveAmnesiaConfig) -> Loader:
    """What loads a model as it was erased from, or as it was saved, on the CPU.

    It takes a role, `"base"`, `"erased"` or any other, and a folder or a name on the Hub; an adapter is loaded into the
    base model.
    """
    places = {"base": (config.revision, config.variant), "erased": (args.erased_revision, None)}

    def load(role: str, name: str) -> Objective:
        revision, variant = places.get(role, (None, None))
        adapter = find_adapter(name, revision)
        if adapter is not None:
            # It has no weights of its own but for a difference to the base model's.
            return with_adapter(load("base", args.base), adapter)
        try:
            pipeline = load_pipeline(
                name, revision, variant, kinds=SUPPORTED_PIPELINES, no_t5=config.no_t5,
                single_file_config=config.single_file_config, weights_dtype=config.weights_dtype,
                base_quantization=config.base_quantization if role == "base" else None,
            )  # fmt: skip
        except (ValueError, OSError) as error:
            # In the words of this program's flags.
            told = one_line(error).replace("--pretrained_model_name_or_path", f"--{role}")
            raise ValueError(told.replace("pretrained_model_name_or_path=", f"--{role} ")) from error
        objective = objective_for(pipeline, config.prediction_type, weights_dtype=config.weights_dtype)
        if role == "base":
            hold_quantized(objective, config.base_quantization)
        return objective

    return load


def subject_of(request: Request, load: Loader, accelerator: Accelerator) -> Subject:
    """Both models, what was erased, and how images are sampled.

    Raises:
        ValueError: A model cannot be loaded, or is not sampled as was asked for.
    """
    args, config = request.args, request.config
    base, erased = (
        load(role, name).place(request.device) for role, name in (("base", args.base), ("erased", args.erased))
    )
    labels = base.labels
    if labels is not None and config.resolution not in (None, base.resolution):
        raise ValueError(f"resolution={config.resolution}: this model draws {base.resolution} pixels only")
    # The images of a surrogate have done their work.
    pairs = (
        pair_classes(config.concept, config.surrogate, labels, must_exist=False)
        if labels
        else pair_concepts(config.concept, config.surrogate, must_exist=False)
    )
    settings = SamplingSettings(
        config.sampler, config.num_inference_steps, config.guidance_scale, args.batch_size or 1, config.resolution
    )
    if args.batch_size is None:
        settings = batch_size_for(base, settings, pairs[0].concept)
        # Batches are dealt out to processes: all must mean the same by them.
        settings = replace(settings, batch_size=min(gather_object([settings.batch_size])))
    folder = args.artifacts_dir or config.resolved_artifacts_dir
    subject = Subject(base, erased, pairs, settings, args.images, args.seed, folder, accelerator)
    subject.erasure_seed = config.seed
    subject.trained_on = {
        "surrogate": config.num_surrogate_images,
        "replay": config.num_replay_images + config.num_neighbour_images,
        "concept": config.num_fisher_samples,
        "probe": STREAMS["probe"].length if config.probes else 0,
    }
    return subject


def provenance_of(request: Request, subject: Subject) -> dict[str, Any]:
    """What the report says of the models and the erasure."""
    args, config = request.args, request.config
    trained_on = erasure_settings(args.erased, args.erased_revision).get("base_quantization")
    is_adapter, held = find_adapter(args.erased, args.erased_revision) is not None, config.base_quantization
    if is_adapter and held != trained_on:
        held = f"{held or 'none'}, trained on {trained_on or 'none'}"
    if subject.accelerator.is_main_process:
        if held != config.base_quantization:
            warn_once(f"base_quantization {held}: the adapter is measured on another base model than it was trained on")
        else:
            warn_of_another_base(args.base, subject.digests(subject.base).module, args.erased, args.erased_revision)
    _, told = kind_in(args.base, config.revision, config.cache_dir, config.single_file_config)
    return {
        "protocol": args.protocol,
        "base_model": args.base,
        "base_revision": resolved_revision(args.base, config.revision),
        "variant": config.variant,
        "erased_model": args.erased,
        "erased_revision": resolved_revision(args.erased, args.erased_revision),
        "base_module": subject.digests(subject.base).module,
        "erased_module": subject.digests(subject.erased).module,
        "weights": weights_in(args.erased),
        "saved": saved_alone(args.erased, args.erased_revision),
        "adapter": adapter_on_record(args.erased, args.erased_revision),
        "ending": recorded_ending(args.erased, args.erased_revision),
        "distilled": told.sentence if told else distilled_on_record(args.erased, args.erased_revision),
        "prediction_type": subject.base.prediction_type,
        "mixed_precision": subject.accelerator.mixed_precision,
        "weights_dtype": config.weights_dtype,
        "base_quantization": held,
        "blur": must_blur(config.blur, [*config.concept, *config.surrogate]),
        "command": args.command,
        "pairs": [
            {"concept": pair.concept, "surrogate": pair.surrogate.value, "kind": pair.surrogate.kind}
            for pair in subject.pairs
        ],
    }


def __getattr__(name: str) -> Any:
    if name in ("main", "parse_args"):
        warnings.warn(
            f"sa_diffusers.evaluation.command_line.{name} is in sa_diffusers.commands.evaluate now",
            DeprecationWarning,
            stacklevel=2,
        )
        # No room imports one above it: this one forwards, for one version.
        return getattr(importlib.import_module("sa_diffusers.commands.evaluate"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def run(args: EvaluationConfig) -> Report | None:
    """Measure, and write the report.

    Returns:
        None in all processes but the main one.

    Raises:
        ValueError: A model, or what scores it, is not as it should be, or another run is using the report's folder.
    """
    started = time.perf_counter()
    # A run that died while it put new weights in place left an erased model of two halves, and what a disk has changed
    # since would pass for what the erasure did.
    check_written(args.erased)
    config = erasure_of(args)
    load = loader(args, config)
    check_request(args, config, load)
    check_writable(args.output_dir, "output_dir")
    accelerator = launched(config.precision)
    request = Request(args, config, accelerator.device)
    protocol = PROTOCOLS[args.protocol](request)
    scorers = request.classifier(), request.networks(), request.measures()
    with OutputFolder(args.output_dir).lock if accelerator.is_main_process else contextlib.nullcontext():
        subject = subject_of(request, load, accelerator)
        comparison = protocol.run(Evaluation(request, subject, load, *scorers, provenance_of(request, subject)))
        if comparison is None:
            # The main process scores what all have sampled.
            return None
        args.output_dir.mkdir(parents=True, exist_ok=True)
        comparison.save(args.output_dir)
    say, report = accelerator.print, comparison.report
    # Of a model that no erasure made, as one that never learnt the class, the card would say that one did.
    if args.output_dir.parent == Path(args.erased) and (Path(args.erased) / CONFIG_NAME).is_file():
        write_model_card(args.erased)
    say(f"\n{format_report(report)}\n")
    if report.distilled:
        say(f"distilled {visible(report.distilled)}")
    say(f"report    {args.output_dir / PAGE_NAME} ({time.perf_counter() - started:.0f} s)")
    if report.verdict:
        say(f"verdict   {visible(report.verdict.line)}")
    return report
