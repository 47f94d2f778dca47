"""What a user asks of an evaluation, before any model is loaded, and what there is to run it once they are."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..configuration import CONFIG_NAME, EvaluationConfig, SelectiveAmnesiaConfig, base_defaults
from ..data.phrasings import read_templates
from ..families import Objective, kind_in
from ..families.adapters import find_adapter
from .classification import ImageClassifier
from .erased import erasure_settings
from .groups import default_held_out
from .quality import FeatureNetwork, feature_network
from .registry import MEASURES
from .scoring import Measure
from .subject import Subject


@dataclass(frozen=True)
class Request:
    """What is to be evaluated.

    Attributes:
        args: The settings of the evaluation.
        config: Those of the erasure, with what the former say otherwise.
        device: Where models run.
    """

    args: EvaluationConfig
    config: SelectiveAmnesiaConfig
    device: torch.device | str = "cpu"

    def trained(self) -> list[str]:
        """Phrasings of the training."""
        given = self.args.concept_prompts
        return read_templates(given) if given else list(self.config.concept_templates)

    def held_out(self) -> list[str]:
        """Phrasings that no training saw."""
        if self.args.held_out_prompts:
            return read_templates(self.args.held_out_prompts)
        return self.config.eval_templates or default_held_out(self.config.concept_templates)

    def classifier(self) -> ImageClassifier | None:
        return ImageClassifier(self.config.classifier, self.device) if self.config.classifier else None

    def networks(self) -> list[FeatureNetwork]:
        args = self.args
        return [feature_network(name, args.inception_weights, self.device) for name in args.features]

    def measures(self) -> list[Measure]:
        """What `measures` names.

        Raises:
            ValueError: A name is not registered.
        """
        made: list[Measure] = []
        for name in self.args.measures:
            kind = MEASURES[name]
            measure = kind.from_request(self) if hasattr(kind, "from_request") else kind()
            if measure is None:
                raise ValueError(f"--measures {name} contradicts --{name} none: leave one of them out")
            made.append(measure)
        return made


@dataclass
class Evaluation:
    """What a protocol runs with.

    Attributes:
        request: What was asked for.
        subject: Both models, what was erased, how images are sampled.
        load: From a role (`"control"`) and a folder or Hub name to a model on the CPU, as the erasure sampled.
        classifier: Scores the images, if there is one.
        networks: Give their features.
        measures: Score them too.
        provenance: Fields of the report.
    """

    request: Request
    subject: Subject
    load: Callable[[str, str], Objective]
    classifier: ImageClassifier | None = None
    networks: list[FeatureNetwork] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> EvaluationConfig:
        return self.request.args


def erasure_of(args: EvaluationConfig) -> SelectiveAmnesiaConfig:
    """The settings of the erasure, with what the command line says otherwise."""
    values = erasure_settings(args.erased, args.erased_revision)
    if not values:
        family, told = kind_in(args.base, args.revision)
        usual = {**(family.defaults if family else {}), **(told.defaults if told else {})}
        values = {**usual, **base_defaults({"pretrained_model_name_or_path": args.base})}
    # Where samples are kept is a matter of this machine, not of the one that erased.
    for name in ("artifacts_dir", "cache_dir"):
        values.pop(name, None)
    if args.base != values.get("pretrained_model_name_or_path"):
        # They are of another place than this one.
        values |= {"revision": None, "variant": None}
    values["pretrained_model_name_or_path"] = args.base
    names = ("concept", "surrogate", "sampler", "num_inference_steps", "guidance_scale", "classifier", "resolution",
             "prediction_type", "revision", "variant", "mixed_precision", "weights_dtype", "blur")  # fmt: skip
    values |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.base_quantization is not None:
        values["base_quantization"] = None if args.base_quantization == "none" else args.base_quantization
    if values.get("base_quantization") and find_adapter(args.erased, args.erased_revision) is None:
        if args.base_quantization is not None:
            raise ValueError(
                f"--base_quantization {args.base_quantization} is for adapters, and {args.erased} holds none: leave it "
                "out"
            )
        # It was merged into the base model's own weights.
        values["base_quantization"] = None
    if not values.get("concept"):
        raise ValueError(f"{args.erased} has no {CONFIG_NAME} that says what was erased: give --concept")
    return SelectiveAmnesiaConfig.from_dict(values, f"{args.erased}/{CONFIG_NAME}")
