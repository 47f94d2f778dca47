"""Evidence: a saved pipeline and its base in, figures and pictures out."""

from ..results.statistics import frechet_distance, wilson_interval
from .classification import Classification, ImageClassifier
from .comparison import Comparison, compare
from .groups import label_groups, prompt_groups
from .scoring import draw_groups, sample_groups, score_groups

__all__ = [
    "Classification",
    "Comparison",
    "ImageClassifier",
    "compare",
    "draw_groups",
    "frechet_distance",
    "label_groups",
    "prompt_groups",
    "sample_groups",
    "score_groups",
    "wilson_interval",
]
