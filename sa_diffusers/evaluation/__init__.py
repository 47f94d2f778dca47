"""Evidence: a saved pipeline and its base in, figures and pictures out."""

from .classification import Classification, ImageClassifier
from .comparison import Comparison, compare, draw_groups, label_groups, prompt_groups, sample_groups, score_groups
from .statistics import frechet_distance, wilson_interval

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
