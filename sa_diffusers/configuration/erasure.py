"""The settings of one erasure, all of them: what the command line, a YAML file and the saved JSON hold."""

import copy
import dataclasses
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_json
from ..messages import did_you_mean, shown
from .fields import checked, documented
from .groups import (
    ConceptSettings,
    FisherSettings,
    HubSettings,
    ModelSettings,
    ReportSettings,
    SampleSettings,
    TrainingSettings,
)
from .names import BASE_DEFAULTS_NAME
from .reading import read_mapping

# What runs on weights of half precision; float32 goes with any.
MIXED_PRECISION = {"float32": None, "bfloat16": "bf16", "float16": "fp16"}
_DEFAULT_CACHE = "~/.cache/sa_diffusers"


@documented
@dataclass
class SelectiveAmnesiaConfig(
    HubSettings, ReportSettings, TrainingSettings, FisherSettings, SampleSettings, ModelSettings, ConceptSettings
):
    """Settings of one erasure (paper, eq. 4 and appendix B.2). Each field is a flag of `sa-diffusers erase`.

    Raises:
        ValueError: A value is out of range, or two values contradict each other. Unknown names in a YAML or JSON file
            are errors too.
    """

    def check(self) -> None:
        """Refuse, or warn of, settings that contradict each other or train nothing."""
        if self.replays and self.num_replay_images == 0:
            raise ValueError("num_replay_images=0 leaves nothing to replay: give some, or set replay_weight to 0")
        if self.consolidates and self.ewc_weight is None and not self.num_probe_images:
            raise ValueError(
                f"ewc={self.ewc:g} is calibrated by probes, and num_probe_images=0 leaves them out: give ewc_weight, "
                "set ewc to 0, or keep the probes"
            )
        if self.adapter is None and self.lora_format != "diffusers":
            raise ValueError(
                f"lora_format={self.lora_format} has no meaning without an adapter: give adapter, or leave it out"
            )
        if self.adapter is not None and self.save_components != "all":
            raise ValueError(
                f"save_components={self.save_components} has no meaning for an adapter, which is saved alone: leave it "
                "out"
            )
        if self.adapter is None and self.fisher_form != "diagonal":
            raise ValueError(f"fisher_form={self.fisher_form} is for adapters: give adapter, or leave it out")
        if self.adapter is None and self.base_quantization is not None:
            raise ValueError(
                f"base_quantization={self.base_quantization} is for adapters, since weights of few bits cannot be "
                "trained themselves: give adapter, or leave it out"
            )
        if self.scale_lr and self.learning_rate is None:
            raise ValueError("scale_lr multiplies a learning rate: give learning_rate, or leave scale_lr out")
        if self.use_8bit_adam and self.learning_rate is None:
            raise ValueError("use_8bit_adam needs a learning rate: give learning_rate, or leave use_8bit_adam out")
        implied = MIXED_PRECISION[self.weights_dtype]
        if implied is not None and self.mixed_precision not in (None, implied):
            raise ValueError(
                f'weights_dtype="{self.weights_dtype}" is trained and sampled with mixed_precision="{implied}", and '
                f'"{self.mixed_precision}" is given: leave mixed_precision out, or load the weights in float32'
            )
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
        if self.learning_rate and self.learning_rate > 1e3:
            yield f"learning_rate={self.learning_rate:g} is so large that training will diverge; 1e-5 is usual"
        if self.learning_rate and self.learning_rate < 1e-12:
            yield f"learning_rate={self.learning_rate:g} is so small that nothing is trained; 1e-5 is usual"
        if self.adam_epsilon > 1:
            yield f"adam_epsilon={self.adam_epsilon:g} is so large that hardly anything is trained; 1e-8 is usual"
        if self.max_grad_norm is not None and self.max_grad_norm < 1e-6:
            yield f"max_grad_norm={self.max_grad_norm:g} is so small that hardly anything is trained; 1 is usual"
        if self.lr_scheduler == "polynomial" and self.lr_power > 50:
            yield f"lr_power={self.lr_power:g} leaves the learning rate at zero after a few steps; 1 is usual"
        usual = type(self).__dataclass_fields__
        wishes = [name for name in ("forget_target", "drift_tolerance") if getattr(self, name) != usual[name].default]
        if wishes and not self.stops and None not in (self.forget_target, self.drift_tolerance):
            cause = "naive" if self.naive else f"num_probe_images={self.num_probe_images}"
            have = "have" if len(wishes) > 1 else "has"
            yield f"{' and '.join(wishes)} {have} no meaning with {cause}: nothing stops the run before its last step"
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

    @property
    def precision(self) -> str | None:
        """The mixed precision that was asked for, or that half-precision weights imply."""
        return self.mixed_precision or MIXED_PRECISION[self.weights_dtype]

    @property
    def replays(self) -> bool:
        """Whether there is a replay loss."""
        return self.replay_weight is None or self.replay_weight > 0

    @property
    def consolidates(self) -> bool:
        """Whether there is an EWC term."""
        return self.ewc > 0 if self.ewc_weight is None else self.ewc_weight > 0

    @property
    def probes(self) -> bool:
        """Whether the training measures itself."""
        return self.num_probe_images > 0

    @property
    def stops(self) -> bool:
        """Whether the training ends by what it measures."""
        return self.probes and not self.naive and None not in (self.forget_target, self.drift_tolerance)

    @property
    def num_concept_eval_images(self) -> int:
        """Images for a row of a concept, on which the verdict rests.

        Four of 100 may show it, and one of 60: where 2 % of a concept are left, 95 % of rows of 100 pass, and 66 % of
        those of 60.
        """
        return max(self.num_eval_images, 100) if self.num_eval_images >= 60 else self.num_eval_images

    def over_base_defaults(self, usual: Mapping[str, Any] | None = None) -> "SelectiveAmnesiaConfig":
        """These settings over those that the base model's own folder recommends: what was written wins, even where it
        is the general default.

        Args:
            usual: What is usual for models of this kind (`Family.defaults`): the folder's recommendations win.

        Raises:
            ValueError: As of `base_defaults`, or the two contradict each other.
        """
        place = {"pretrained_model_name_or_path": self.pretrained_model_name_or_path}
        defaults = base_defaults({**self.written, **place})
        settings = {**(usual or {}), **defaults, **self.written}
        if all(getattr(self, name) == value for name, value in settings.items()):
            # Not built again: its doubts have been told.
            return copy.deepcopy(self)
        return type(self)(**settings)

    def replace(self, **changes: Any) -> "SelectiveAmnesiaConfig":
        """The same settings but for some; what was not written stays open to the base model's recommendations.

        (`dataclasses.replace` writes every setting.)
        """
        return type(self)(**{**self.written, **changes})

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
        from ..version import __version__

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


def check_names(values: dict[str, Any], source: str) -> None:
    """Refuse names that are no settings.

    Raises:
        ValueError: There is one; the message proposes near ones.
    """
    known = [spec.name for spec in dataclasses.fields(SelectiveAmnesiaConfig)]
    for name in values:
        if name not in known:
            raise ValueError(f'{source}: "{shown(name)}" is not a setting{did_you_mean(str(shown(name)), known, "")}')


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read the settings in a YAML (`.yaml`, `.yml`) or JSON file, and check their names.

    Args:
        path: The file, or the name of one that comes with the package (`mnist_vae`).

    Raises:
        ValueError: There is no such file, it is of another kind, not a mapping, or names a setting that does not exist.
    """
    values, place = read_mapping(path)
    values.pop("sa_diffusers_version", None)
    check_names(values, place)
    return values


def base_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a base model's own folder recommends, if it does.

    Args:
        settings: What the user gave; only the base model's name and the classifier are read. Features of real images
            are of the classifier that the folder recommends, and go with it.

    Raises:
        ValueError: The name, or the file in the folder, is not as it should be, or sets what is for the user to say.
    """
    fields = SelectiveAmnesiaConfig.__dataclass_fields__
    field = fields["pretrained_model_name_or_path"]
    folder = Path(checked(field, settings.get(field.name, field.default)))
    file = folder / BASE_DEFAULTS_NAME
    if not os.path.isfile(file):
        return {}
    defaults = read_settings(file)
    for name in defaults:
        if fields[name].metadata["own"]:
            raise ValueError(f"{file}: {name} is for the user to say, not for a model's folder: remove it")
    for name in _places(defaults):
        defaults[name] = str((folder / defaults[name]).resolve())
    source = defaults.get("replay_prompts")
    if source is not None and _is_foreign(source, folder):
        raise ValueError(
            f"{file}: replay_prompts={shown(source, 200)} is a file elsewhere on this machine, whose lines would stand "
            "in the report: keep the prompts beside the model, or give --replay_prompts yourself"
        )
    if "classifier" in settings and "reference_features" in defaults:
        classifier = checked(fields["classifier"], settings["classifier"])
        if classifier is None or Path(classifier).resolve() != Path(defaults.get("classifier", "")).resolve():
            del defaults["reference_features"]
    return defaults


def _is_foreign(source: str, folder: Path) -> bool:
    """Whether a model's folder recommends to read a text from a place that is not its own."""
    place = Path(source.split(":")[0]).expanduser()
    outside = not place.resolve().is_relative_to(folder.resolve().parent)
    return outside and (place.is_absolute() or ".." in place.parts or place.exists())


def inherited_defaults(base: str, folder: Path | None = None) -> dict[str, Any]:
    """What a base model's own folder recommends, as it stands in the folder of an erased one.

    Args:
        base: The base model.
        folder: The erased one's; None leaves out what lies beside the base model.
    """
    file = Path(base) / BASE_DEFAULTS_NAME
    if not os.path.isfile(file):
        return {}
    defaults = read_settings(file)
    for name in _places(defaults):
        if folder is None:
            del defaults[name]
        else:
            target = (Path(base) / defaults[name]).resolve()
            defaults[name] = f"../{os.path.relpath(target, folder.resolve().parent)}"
    source = defaults.get("replay_prompts")
    if (
        source is not None
        and source.startswith("../")
        and (folder is None or _is_foreign(str(folder / source), folder))
    ):
        # A text that lies elsewhere does not come along: see `base_defaults`.
        defaults.pop("replay_prompts", None)
    return defaults


def _places(defaults: dict[str, Any]) -> list[str]:
    """Names of the settings that say where something lies, as seen from the model's folder."""
    fields = SelectiveAmnesiaConfig.__dataclass_fields__
    return [name for name, value in defaults.items()
            if fields[name].metadata["path"] and isinstance(value, str) and value.startswith("../")]  # fmt: skip
