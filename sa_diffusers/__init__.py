"""Make a generative model forget: Selective Amnesia (Heng and Soh, NeurIPS 2023) for diffusers.

From a concept's name to an erased pipeline:

    from sa_diffusers import coloured_pipeline, erase

    pipeline, report = erase(str(coloured_pipeline()), "fox", "dog")
    print(report.verdict.line)

`Erasure` is the same with its stages one by one, from a `SelectiveAmnesiaConfig`, into a folder.

`help(SelectiveAmnesiaConfig)` says what each setting means. The steps are there one by one: `load_pipeline` and
`objective_for` make a model known, `SampleGenerator` samples from it, `FisherEstimator` finds what matters to what it
is to remember, and `SelectiveAmnesiaTrainer` trains it. Names are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .configuration import SelectiveAmnesiaConfig
    from .data import ErasurePair, SampleGenerator, SampleSet, Surrogate, pair_concepts, replay_prompts
    from .erasure import Erasure
    from .families import LatentDiffusionObjective, Objective, SamplingSettings, load_pipeline, objective_for
    from .fisher import FisherEstimator, FisherInformation
    from .models import coloured_pipeline, embedded_classifier, embedded_pipeline
    from .parameter_selection import select_parameters
    from .trainer import SelectiveAmnesiaTrainer
    from .training.ewc import ElasticWeightConsolidation
    from .unlearn import Erased, erase

# Imported when first used, so that `--help` and mistakes on the command line answer at once.
_ROOMS = {
    "configuration": ["SelectiveAmnesiaConfig"],
    "data": ["ErasurePair", "SampleGenerator", "SampleSet", "Surrogate", "pair_concepts", "replay_prompts"],
    "erasure": ["Erasure"],
    "training.ewc": ["ElasticWeightConsolidation"],
    "fisher": ["FisherEstimator", "FisherInformation"],
    "models": ["coloured_pipeline", "embedded_classifier", "embedded_pipeline"],
    "families": ["LatentDiffusionObjective", "Objective", "SamplingSettings", "load_pipeline", "objective_for"],
    "parameter_selection": ["select_parameters"],
    "trainer": ["SelectiveAmnesiaTrainer"],
    "unlearn": ["Erased", "erase"],
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "ElasticWeightConsolidation",
    "Erased",
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
    "coloured_pipeline",
    "embedded_classifier",
    "embedded_pipeline",
    "erase",
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


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
