"""Every setting of an erasure: one dataclass behind the command line, the YAML file and the saved JSON."""

import dataclasses
import json
import math
import os
import re
import types
import typing
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from .files import write_json
from .messages import did_you_mean, near_paths, shown, shown_error
from .texts import read_text

# Files in the folder of an erased pipeline, and of a base model.
CONFIG_NAME = "selective_amnesia.json"
HISTORY_NAME = "training_history.json"
REPORT_NAME = "report.json"
GRID_NAME = "before_after.png"
FISHER_CONFIG_NAME = "fisher_config.json"
BASE_DEFAULTS_NAME = "selective_amnesia_defaults.json"
SAMPLERS = ("ddim", "ddpm", "pndm", "euler", "dpmsolver++", "dpmsolver++_logsnr", "unipc")
_DEFAULT_CACHE = "~/.cache/sa_diffusers"
_LONGEST_TEXT = 10_000
# So much of something that a run would never come to its end, or to its beginning.
_AT_MOST = {
    2**64 - 1: ("seed",),
    2**63: ("eval_seed",),
    100_000_000: ("max_train_steps", "checkpointing_steps", "validation_steps", "logging_steps",
                  "checkpoints_total_limit", "lr_warmup_steps"),
    1_000_000: ("num_replay_images", "num_fisher_samples", "lr_num_cycles"),
    500_000: ("num_surrogate_images",),
    100_000: ("num_eval_images", "fisher_timesteps"),
    65_536: ("sample_batch_size", "fisher_batch_size", "train_batch_size", "gradient_accumulation_steps"),
    10_000: ("num_inference_steps", "num_validation_images", "guidance_scale", "surrogate_guidance_scale",
             "replay_guidance_scale", "resolution"),
    1_000: ("noise_offset", "adam_weight_decay", "lr_power"),
    100: ("adam_epsilon",),
    10**15: ("ewc_weight", "replay_weight"),
}  # fmt: skip
TARGETS = ("noise", "frozen")
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


def _flag(default: Any, help: str, group: str, path: bool = False, own: bool = False) -> Any:
    """A setting: `path` if it is, or may be, one on this machine; `own` if no base model may recommend it."""
    metadata = {"help": help, "group": group, "path": path, "own": own}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class SelectiveAmnesiaConfig:
    """Settings of one erasure (paper, eq. 4 and appendix B.2). Each field is a flag of `examples/train_sa.py`.

    Raises:
        ValueError: A value is out of range, or two values contradict each other. Unknown names in a YAML or JSON file
            are errors too.
    """

    # What to forget
    concept: list[str] = _flag([], "concept(s) to forget, each in quotes", "what to forget", own=True)
    surrogate: list[str] = _flag(
        [],
        "what each concept turns into: a prompt, a folder of images (a path with a slash), or uniform_noise; "
        "one for all concepts, or one for each",
        "what to forget",
        path=True,
        own=True,
    )
    concept_templates: list[str] = _flag(
        ["{}"],
        "phrasings in which the concept is forgotten; {} stands for it (the paper: the bare concept)",
        "what to forget",
    )

    # Model
    pretrained_model_name_or_path: str = _flag(
        "CompVis/stable-diffusion-v1-4", "the base model: a folder or a name on the Hub", "model", path=True, own=True
    )
    revision: str | None = _flag(None, "branch, tag or commit of the base model on the Hub", "model", own=True)
    variant: str | None = _flag(None, "variant of the weight files, such as fp16", "model")
    cache_dir: str | None = _flag(
        None, "where models from the Hub are kept (default: the Hub's own cache)", "model", path=True, own=True
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = _flag(
        None, "what the denoiser predicts (default: as the base model's scheduler says)", "model"
    )
    train_method: str = _flag(
        "full",
        "parameters to train: full, xattn (cross-attention only), noxattn (unconditional layers only), or a regular "
        "expression on parameter names",
        "model",
    )
    resolution: int | None = _flag(None, "height and width of images in pixels (default: the model's own)", "model")

    # Samples from the frozen model
    num_surrogate_images: int = _flag(200, "surrogate images, over all concepts", "samples")
    num_replay_images: int = _flag(400, "replay images", "samples")
    replay_prompts: str = _flag(
        "diverse",
        "prompts to remember: diverse or garments (built in), a text file with one a line, a CSV, TSV, JSON, JSON "
        "lines or parquet file as FILE or FILE:COLUMN, or a dataset as NAME:COLUMN or NAME:COLUMN:SPLIT",
        "samples",
        path=True,
    )
    drop_naming_prompts: bool = _flag(
        False, "leave out replay prompts that name the concept, and count them, in place of refusing them", "samples"
    )
    replay_surrogates: bool = _flag(
        True, "replay the surrogate's samples under the surrogate's own prompt too (the paper does not)", "samples"
    )
    replay_unconditional_share: float = _flag(
        0.1,
        "share of the replay images that belong to the empty prompt, which guidance leans on at every step",
        "samples",
    )
    sampler: Literal["ddim", "ddpm", "pndm", "euler", "dpmsolver++", "dpmsolver++_logsnr", "unipc"] = _flag(
        "ddim", "sampler; with _logsnr its steps are equal in log-SNR, not in time, which suits pixels", "samples"
    )
    num_inference_steps: int = _flag(50, "steps of the sampler", "samples")
    guidance_scale: float = _flag(7.5, "classifier-free guidance", "samples")
    surrogate_guidance_scale: float | None = _flag(
        None, "guidance of the surrogate images (default: as above)", "samples"
    )
    replay_guidance_scale: float | None = _flag(
        None, "guidance of the replay images; 1 draws from the model's own distribution (default: as above)", "samples"
    )
    sample_batch_size: int = _flag(8, "images sampled at once", "samples")
    artifacts_dir: str | None = _flag(
        None,
        "where samples and Fisher information are kept and reused (default: $SA_DIFFUSERS_CACHE or "
        "~/.cache/sa_diffusers)",
        "samples",
        path=True,
        own=True,
    )

    # Fisher information and elastic weight consolidation
    fisher: str | None = _flag(
        None, "saved Fisher information to use: a folder or a name on the Hub", "fisher", path=True
    )
    num_fisher_samples: int = _flag(100, "samples that the Fisher information is averaged over", "fisher")
    fisher_timesteps: int | None = _flag(
        50, "timesteps of each sample whose gradients are summed; 0 takes all (exact)", "fisher"
    )
    fisher_batch_size: int = _flag(10, "timesteps of one sample in one backward pass", "fisher")
    fisher_concept_share: float | None = _flag(
        0.1,
        "share of the Fisher samples that are the concept's own; null (the paper) is uniform over all classes, or, "
        "where prompts are text, takes the replay prompts alone",
        "fisher",
    )
    ewc_weight: float = _flag(50.0, "weight of sum F (theta - theta*)^2; half of the paper's lambda", "fisher")
    replay_weight: float = _flag(1.0, "weight of the replay loss (gamma); 0 leaves replay out", "fisher")

    # Training
    output_dir: str | None = _flag(
        None, "output folder (default: named after the concept)", "training", path=True, own=True
    )
    overwrite_output_dir: bool = _flag(False, "replace an earlier erasure in the output folder", "training", own=True)
    seed: int = _flag(0, "seed of everything random", "training")
    max_train_steps: int = _flag(400, "optimiser steps", "training")
    train_batch_size: int = _flag(4, "surrogate images and replay images, each, in a batch of one device", "training")
    gradient_accumulation_steps: int = _flag(1, "batches summed before an optimiser step", "training")
    gradient_checkpointing: bool = _flag(False, "trade time for memory in the backward pass", "training")
    target: Literal["noise", "frozen"] = _flag(
        "frozen",
        "regression target: the frozen model's own prediction for the surrogate prompt and for replay, or the noise "
        "(the paper)",
        "training",
    )
    condition_dropout: float = _flag(
        0.0,
        "share of images trained under the empty prompt: replay images, surrogates that no prompt drew (noise, say), "
        "and with the frozen target those that one did",
        "training",
    )
    naive: bool = _flag(
        False,
        "lower the ELBO of the concept's own samples (eq. 3 of the paper, its negative example) in place of raising "
        "that of the surrogate's",
        "training",
    )
    snr_gamma: float | None = _flag(None, "min-SNR weighting of the losses; 5.0 is usual", "training")
    noise_offset: float = _flag(0.0, "offset of the noise, constant over an image's pixels", "training")
    learning_rate: float = _flag(1e-5, "learning rate", "training")
    scale_lr: bool = _flag(False, "multiply the learning rate by devices x accumulation x batch size", "training")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = _flag("constant", "schedule of the learning rate", "training")
    lr_warmup_steps: int = _flag(0, "steps of warm-up", "training")
    lr_num_cycles: int = _flag(1, "restarts of cosine_with_restarts", "training")
    lr_power: float = _flag(1.0, "power of polynomial", "training")
    use_8bit_adam: bool = _flag(False, "8-bit Adam of bitsandbytes", "training")
    adam_beta1: float = _flag(0.9, "beta 1 of Adam", "training")
    adam_beta2: float = _flag(0.999, "beta 2 of Adam", "training")
    adam_weight_decay: float = _flag(0.0, "weight decay of AdamW (it pulls against the EWC term)", "training")
    adam_epsilon: float = _flag(1e-8, "epsilon of Adam", "training")
    max_grad_norm: float = _flag(1.0, "clip the gradient, the EWC term's included, to this norm", "training")
    use_ema: bool = _flag(False, "average the weights over the steps and keep the average", "training")
    ema_decay: float = _flag(0.99, "decay of the average", "training")
    ema_warmup: bool = _flag(
        True,
        "let the decay grow from 0 over the first steps; without, the average starts at the base model's weights and "
        "decays at one rate (the paper)",
        "training",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _flag(
        None, "no, fp16 or bf16 (default: as `accelerate config` says)", "training"
    )
    allow_tf32: bool = _flag(False, "TF32 matrix products on Ampere GPUs and newer", "training")
    enable_xformers_memory_efficient_attention: bool = _flag(False, "attention of xformers", "training")
    checkpointing_steps: int = _flag(500, "steps between checkpoints", "training")
    checkpointing_minutes: float = _flag(
        5.0,
        "beside those, a checkpoint every tenth of the training, if the last is so many minutes old or writing one "
        "takes next to nothing",
        "training",
    )
    checkpoints_total_limit: int | None = _flag(2, "checkpoints kept", "training")
    resume_from_checkpoint: str | None = _flag(
        "latest",
        "latest goes on where this very run stopped, no starts over, a checkpoint's folder goes on from that one",
        "training",
        path=True,
        own=True,
    )

    # Validation, evaluation, tracking, Hub
    validation_prompts: list[str] = _flag([], "prompts sampled during training", "evaluation")
    validation_steps: int = _flag(100, "steps between validation images", "evaluation")
    num_validation_images: int = _flag(4, "validation images for each prompt", "evaluation")
    classifier: str | None = _flag(
        None, "image classifier that scores the result: a folder or a name on the Hub", "evaluation", path=True
    )
    reference_features: str | None = _flag(
        None,
        "file with the features of real images, for Fréchet distances in the classifier's features",
        "evaluation",
        path=True,
    )
    clip: str | None = _flag(
        None,
        "CLIP model that scores the result where there is no classifier: a folder, a name on the Hub, or none "
        "(default: openai/clip-vit-large-patch14 if it lies in the Hub's local cache)",
        "evaluation",
        path=True,
        own=True,
    )
    num_eval_images: int = _flag(
        40, "images for each row of the evaluation; fewer than 35 cannot show that a concept is gone", "evaluation"
    )
    eval_templates: list[str] = _flag(
        [],
        "phrasings of the evaluation that no training saw; {} stands for the concept (default, where prompts are text: "
        "nine built-in ones)",
        "evaluation",
    )
    eval_seed: int = _flag(1_000_000, "first seed of the evaluation's images", "evaluation")
    blur: Literal["auto", "yes", "no"] = _flag(
        "auto",
        "blur every picture that is written: auto does where what is erased is nudity or of its kind",
        "evaluation",
    )
    require_forgotten: bool = _flag(
        False, "end with exit code 3 unless the verdict is that every concept is forgotten", "evaluation", own=True
    )
    report_to: Literal["tensorboard", "wandb", "none"] = _flag(
        "tensorboard", "tracker of the losses", "evaluation", own=True
    )
    logging_dir: str = _flag(
        "logs", "folder of the tracker, inside the output folder", "evaluation", path=True, own=True
    )
    logging_steps: int = _flag(10, "steps between entries of the tracker", "evaluation")
    tracker_project_name: str = _flag("selective-amnesia", "project name of the tracker", "evaluation", own=True)
    push_to_hub: bool = _flag(False, "upload the output folder to the Hub", "evaluation", own=True)
    hub_model_id: str | None = _flag(None, "name on the Hub (default: the output folder's)", "evaluation", own=True)
    hub_private_repo: bool = _flag(False, "make the repository on the Hub private", "evaluation", own=True)

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            setattr(self, spec.name, _coerce(spec, getattr(self, spec.name)))
        self._check_ranges()
        self._check_places()
        self._check_sense()

    def _check_ranges(self) -> None:
        at_least = {
            1: (
                "num_surrogate_images", "sample_batch_size", "num_fisher_samples", "fisher_batch_size",
                "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpointing_steps",
                "validation_steps", "num_validation_images", "num_eval_images", "num_inference_steps",
                "checkpoints_total_limit", "logging_steps", "lr_num_cycles",
            ),
            0: (
                "num_replay_images", "fisher_timesteps", "ewc_weight", "replay_weight", "noise_offset",
                "lr_warmup_steps", "adam_weight_decay", "guidance_scale", "surrogate_guidance_scale",
                "replay_guidance_scale", "seed", "eval_seed",
            ),
        }  # fmt: skip
        for bound, names in at_least.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not value >= bound:
                    raise ValueError(f"{name}={shown(value)} must be at least {bound}")
        for bound, names in _AT_MOST.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and value > bound:
                    raise ValueError(f"{name}={shown(value)} must be at most {bound:,}")
        for name in ("learning_rate", "max_grad_norm", "snr_gamma", "adam_epsilon", "lr_power"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be greater than 0")
        for name in ("replay_unconditional_share", "condition_dropout", "ema_decay", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and less than 1")
        if self.resolution is not None and (self.resolution < 8 or self.resolution % 8):
            raise ValueError(f"resolution={shown(self.resolution)} must be a positive multiple of 8 pixels")

    def _check_places(self) -> None:
        """Refuse places that are none, or outside of where they belong."""
        inside = PureWindowsPath(self.logging_dir)  # it knows the separators of all systems
        if inside.anchor or ".." in inside.parts or not inside.parts:
            raise ValueError(
                f'logging_dir="{shown(self.logging_dir)}" must be a folder inside the output folder, such as "logs"'
            )
        name = self.tracker_project_name
        if any(letter in name for letter in "/\\:") or name.startswith(".") or name != name.strip():
            raise ValueError(
                f'tracker_project_name="{shown(name)}" must be a name without slashes, such as "selective-amnesia"'
            )
        for name, example in (("revision", "main"), ("variant", "fp16")):
            value = getattr(self, name)
            # They become parts of paths in the Hub's cache; a branch may hold a slash.
            if value and re.search(r"^[/.]|\.\.|\\" + ("|/" if name == "variant" else ""), value):
                raise ValueError(f'{name}="{shown(value)}" must be a name, such as "{example}", not a path')
        for name in ("output_dir", "artifacts_dir", "cache_dir"):
            value = getattr(self, name)
            if value is not None and os.path.isfile(value):
                raise ValueError(f"{name}={shown(value, 200)} is a file: choose a folder")

    def _check_sense(self) -> None:
        """Refuse, or warn of, settings that contradict each other or train nothing."""
        if self.replay_weight > 0 and self.num_replay_images == 0:
            raise ValueError("num_replay_images=0 leaves nothing to replay: give some, or set replay_weight to 0")
        if self.reference_features is not None and self.classifier is None:
            raise ValueError("reference_features needs a classifier: give the one that the features came from")
        for name in ("concept_templates", "eval_templates"):
            for template in getattr(self, name):
                if "{}" not in template:
                    raise ValueError(f'{name}: "{shown(template)}" has no {{}} where the concept goes')
        if not self.concept_templates:
            raise ValueError('concept_templates is empty: give at least one, such as "{}" (the bare concept)')
        if self.num_surrogate_images < len(self.concept):
            raise ValueError(
                f"num_surrogate_images={self.num_surrogate_images} leaves some of the {len(self.concept)} concepts "
                "without an image: give at least one for each"
            )
        for doubt in self._doubts():
            warnings.warn(doubt, stacklevel=4)

    def _doubts(self) -> Iterator[str]:
        if self.lr_warmup_steps >= self.max_train_steps and self.lr_scheduler != "constant":
            yield (
                f"lr_warmup_steps={self.lr_warmup_steps} leaves none of the {self.max_train_steps} steps of "
                "max_train_steps at the full learning rate: give fewer"
            )
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            yield f"lr_warmup_steps={self.lr_warmup_steps} has no meaning for a constant schedule: constant_with_warmup"
        if self.learning_rate > 1e3:
            yield f"learning_rate={self.learning_rate:g} is so large that training will diverge; 1e-5 is usual"
        if self.learning_rate < 1e-12:
            yield f"learning_rate={self.learning_rate:g} is so small that nothing is trained; 1e-5 is usual"
        if self.adam_epsilon > 1:
            yield f"adam_epsilon={self.adam_epsilon:g} is so large that hardly anything is trained; 1e-8 is usual"
        if self.use_ema and not self.ema_warmup and self.ema_decay**self.max_train_steps > 0.99:
            yield (
                f"ema_decay={self.ema_decay:g} over {self.max_train_steps} steps keeps the average at the base model's "
                "weights: nothing is trained"
            )
        if self.validation_prompts and self.validation_steps > self.max_train_steps:
            yield (
                f"validation_steps={self.validation_steps} is more than max_train_steps={self.max_train_steps}: there "
                "will be no validation images"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "the given settings") -> "SelectiveAmnesiaConfig":
        """Build a configuration from a plain dictionary.

        Raises:
            ValueError: A name is unknown (the message proposes near ones) or a value is not allowed.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{source} must be settings by name, not a {type(values).__name__}")
        check_names(values, source)
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> "SelectiveAmnesiaConfig":
        """Read a YAML or JSON file; see `read_settings`."""
        return cls.from_dict(read_settings(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Write all settings as JSON, with the version of the package that they belong to."""
        from .version import __version__

        write_json(path, {"sa_diffusers_version": __version__, **self.to_dict()})

    @property
    def resolved_output_dir(self) -> Path:
        """`output_dir`, or a folder in the current one named after the concept."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        name = re.sub(r"[^\w-]+", "-", " and ".join(self.concept).lower()).strip("-_")
        # File systems count bytes, 255 at most.
        return Path(name[:80].encode()[:200].decode(errors="ignore") or "erased")

    @property
    def resolved_artifacts_dir(self) -> Path:
        return Path(self.artifacts_dir or os.path.expanduser(os.environ.get("SA_DIFFUSERS_CACHE") or _DEFAULT_CACHE))


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read the settings in a YAML (`.yaml`, `.yml`) or JSON file, and check their names.

    Raises:
        ValueError: The file is of another kind, not a mapping, or names a setting that does not exist.
    """
    place = f"configuration file {shown(str(path), 200)}"
    try:
        path = Path(path).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError, RuntimeError):
        raise ValueError(f"{place} does not exist") from None
    if is_folder:
        raise ValueError(f"{place} is a folder: give a file")
    if not is_file:
        raise ValueError(f"{place} does not exist{near_paths(path)}")
    if path.suffix in (".yaml", ".yml"):
        values = _read_yaml(read_text(path, place), place)
    elif path.suffix == ".json":
        values = _read_json(read_text(path, place), place)
    else:
        raise ValueError(f"{place} must end in .yaml, .yml or .json")
    if not isinstance(values, dict):
        raise ValueError(f"{place} must hold settings as `name: value`")
    values.pop("sa_diffusers_version", None)
    check_names(values, place)
    return values


def _read_yaml(text: str, place: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a name that stands twice, of which YAML would take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            names = [key.value for key, _ in node.value if isinstance(key.value, str)]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f'"{shown(name)}" stands twice')
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{place} is not valid YAML ({shown(error.problem or 'damaged')}{line})") from error
    except Exception as error:  # dates that are none, numbers too long, lists too deep: each fails in a way of its own
        raise ValueError(f"{place} is not valid YAML ({shown_error(error)})") from error


def _read_json(text: str, place: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'"{shown(name)}" stands twice')
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON ({shown_error(error)})") from error


def check_names(values: dict[str, Any], source: str) -> None:
    """Refuse names that are no settings.

    Raises:
        ValueError: There is one; the message proposes near ones.
    """
    known = [spec.name for spec in dataclasses.fields(SelectiveAmnesiaConfig)]
    for name in values:
        if name not in known:
            raise ValueError(f'{source}: "{shown(name)}" is not a setting{did_you_mean(str(shown(name)), known, "")}')


def flag_type(annotation: Any) -> tuple[type, bool, tuple | None]:
    """The element type, whether it is a list, and the allowed values, of a field's annotation."""
    options = [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        options = [option for option in typing.get_args(annotation) if option is not types.NoneType]
    option = options[0]
    if typing.get_origin(option) is list:
        return typing.get_args(option)[0], True, None
    if typing.get_origin(option) is Literal:
        return str, False, typing.get_args(option)
    return option, False, None


def _coerce(spec: dataclasses.Field, value: Any) -> Any:
    """Check a value against its field's type; a single string serves as a list of one, a path's `~` is expanded."""
    kind, is_list, allowed = flag_type(spec.type)
    # YAML reads a bare `no` as false.
    if value is False and (spec.name == "resume_from_checkpoint" or "no" in (allowed or ())):
        value = "no"
    if value is None and spec.name == "resume_from_checkpoint":
        value = spec.default
    if value is None:
        if types.NoneType not in typing.get_args(spec.type):
            raise ValueError(f"{spec.name} must be given")
        return None
    if is_list:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, kind) for item in value):
            raise ValueError(
                f"{spec.name}={shown(value)} must be a list of {kind.__name__}: put each in quotes if it is text"
            )
        return [_text(spec, item) for item in value]
    if allowed is not None:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f'{spec.name}="{shown(value)}" is not one of {", ".join(f"{item!r}" for item in allowed)}')
        return value
    if kind is float and not isinstance(value, bool):
        # YAML reads 1e-5 (no dot) as a string.
        try:
            value = float(value)
        except (TypeError, ValueError):
            # What Python writes of a text is in quotes.
            given = repr(shown(value)) if isinstance(value, str) else shown(value)
            raise ValueError(f"{spec.name}={given} must be a number") from None
        except OverflowError:
            raise ValueError(f"{spec.name}={shown(value)} must be finite: it is too large a number") from None
        if not math.isfinite(value):
            raise ValueError(f"{spec.name}={value} must be finite")
        return value
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
        given = repr(shown(value)) if isinstance(value, str) else shown(value)
        raise ValueError(f"{spec.name}={given} must be of type {kind.__name__}")
    if kind is str:
        value = _text(spec, value)
        if not value.strip():
            raise ValueError(f"{spec.name} is empty: give it a value, or leave it out")
    return value


def _text(spec: dataclasses.Field, value: str) -> str:
    """A text that files can hold; where it is a path, with its `~` expanded."""
    unwritable = [letter for letter in value if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\t\n\r"]
    if unwritable:
        raise ValueError(f'{spec.name}="{shown(value)}" holds the character {shown(unwritable[0])}: leave it out')
    if len(value) > _LONGEST_TEXT:
        raise ValueError(f'{spec.name}="{shown(value)}" has {len(value):,} characters, {_LONGEST_TEXT:,} are allowed')
    if not spec.metadata["path"]:
        return value
    if value.startswith("~"):
        expanded = os.path.expanduser(value)
        if expanded.startswith("~"):
            raise ValueError(f'{spec.name}="{shown(value)}": there is no such user: give the whole path')
        value = expanded
    # A surrogate may be a prompt of any length.
    if spec.name != "surrogate" and max(len(os.fsencode(part)) for part in value.split(os.sep)) > 255:
        raise ValueError(f'{spec.name}="{shown(value)}" is longer than the name of a file can be')
    return value


def base_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a base model's own folder recommends, if it does.

    Args:
        settings: What the user gave; only the base model's name is read.

    Raises:
        ValueError: The name, or the file in the folder, is not as it should be, or sets what is for the user to say.
    """
    fields = SelectiveAmnesiaConfig.__dataclass_fields__
    field = fields["pretrained_model_name_or_path"]
    folder = Path(_coerce(field, settings.get(field.name, field.default)))
    file = folder / BASE_DEFAULTS_NAME
    if not os.path.isfile(file):
        return {}
    defaults = read_settings(file)
    for name in defaults:
        if fields[name].metadata["own"]:
            raise ValueError(f"{file}: {name} is for the user to say, not for a model's folder: remove it")
    for name, value in defaults.items():
        if fields[name].metadata["path"] and isinstance(value, str) and value.startswith("../"):
            defaults[name] = str((folder / value).resolve())
    return defaults
