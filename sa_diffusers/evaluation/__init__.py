"""Evidence: a saved pipeline and its base in, figures and pictures out."""

from ..moved import forward_parts
from ..results.statistics import frechet_distance, wilson_interval
from .attacks import Attack
from .classification import Classification, ImageClassifier
from .comparison import Comparison, compare
from .groups import label_groups, prompt_groups
from .protocols.base import Protocol
from .registry import register_attack, register_measure, register_protocol
from .scoring import Measure, draw_groups, sample_groups, score_groups

__all__ = [
    "Attack",
    "Classification",
    "Comparison",
    "ImageClassifier",
    "Measure",
    "Protocol",
    "compare",
    "draw_groups",
    "frechet_distance",
    "label_groups",
    "prompt_groups",
    "register_attack",
    "register_measure",
    "register_protocol",
    "sample_groups",
    "score_groups",
    "wilson_interval",
]

# Earlier names of modules, for one version.
_ATTACKS = tuple(f"evaluation.attacks.{name}" for name in ("base", "misspellings", "inversion"))
_MOVED = {
    "clip": ("evaluation.measures.clip",),
    "concept_protocol": ("evaluation.groups", "evaluation.neighbours", "evaluation.protocols.concept"),
    "detector_protocols": ("evaluation.protocols.celebrity", "evaluation.protocols.nudity"),
    "faces": ("evaluation.measures.faces",),
    "nudity": ("evaluation.measures.nudity", "evaluation.i2p"),
    "report": ("report", "results.figures"),
    "robustness": (*_ATTACKS, "evaluation.protocols.robustness"),
    "statistics": ("results.statistics",),
}
globals().update(forward_parts(__name__, _MOVED))
