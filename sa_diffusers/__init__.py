"""Make a generative model forget: Selective Amnesia (Heng and Soh, NeurIPS 2023) for diffusers."""

from .configuration import SelectiveAmnesiaConfig
from .data import ErasurePair, SampleGenerator, SampleSet, Surrogate, pair_concepts, replay_prompts
from .erasure import Erasure
from .ewc import ElasticWeightConsolidation
from .fisher import FisherEstimator, FisherInformation
from .objectives import LatentDiffusionObjective, Objective, SamplingSettings, load_pipeline, objective_for
from .parameter_selection import select_parameters
from .trainer import SelectiveAmnesiaTrainer
from .version import __version__

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
    "load_pipeline",
    "objective_for",
    "pair_concepts",
    "replay_prompts",
    "select_parameters",
]
