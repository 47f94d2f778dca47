"""Make a generative model forget: Selective Amnesia (Heng and Soh, NeurIPS 2023) for diffusers."""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .configuration import SelectiveAmnesiaConfig
    from .data import ErasurePair, SampleGenerator, SampleSet, Surrogate, pair_concepts, replay_prompts
    from .erasure import Erasure
    from .families import LatentDiffusionObjective, Objective, SamplingSettings, load_pipeline, objective_for
    from .fisher import FisherEstimator, FisherInformation
    from .models import embedded_classifier, embedded_pipeline
    from .parameter_selection import select_parameters
    from .training.ewc import ElasticWeightConsolidation
    from .training.trainer import SelectiveAmnesiaTrainer

# Imported when first used, so that `--help` and mistakes on the command line answer at once.
_ROOMS = {
    "configuration": ["SelectiveAmnesiaConfig"],
    "data": ["ErasurePair", "SampleGenerator", "SampleSet", "Surrogate", "pair_concepts", "replay_prompts"],
    "erasure": ["Erasure"],
    "training.ewc": ["ElasticWeightConsolidation"],
    "fisher": ["FisherEstimator", "FisherInformation"],
    "models": ["embedded_classifier", "embedded_pipeline"],
    "families": ["LatentDiffusionObjective", "Objective", "SamplingSettings", "load_pipeline", "objective_for"],
    "parameter_selection": ["select_parameters"],
    "training.trainer": ["SelectiveAmnesiaTrainer"],
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "ElasticWeightConsolidation",
    "Erasure",
    "ErasurePair",
    "FisherEstimator",
    "FisherInformation",
    "LatentDiffusionObjective",
    "Objective",
    "SampleGenerator",
    "SampleSet",
    "SamplingSettings",
    "SelectiveAmnesiaConfig",
    "SelectiveAmnesiaTrainer",
    "Surrogate",
    "__version__",
    "embedded_classifier",
    "embedded_pipeline",
    "load_pipeline",
    "objective_for",
    "pair_concepts",
    "replay_prompts",
    "select_parameters",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)
