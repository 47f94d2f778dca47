"""The stages of an erasure: each with its inputs, what its product depends on, what it costs, and the product."""

from .base import Stage
from .evaluation import EvaluationImages, ReportStage
from .fisher import FisherStage
from .probes import ProbeStage
from .publishing import CardStage, PushStage
from .samples import ReplayStage, SurrogateStage
from .subject import Subject, prepare
from .training import TrainingStage

# What each artefact depends on: settings, which act through weights, prompts and seeds.
DEPENDENCIES: dict[str, frozenset[str]] = {
    "surrogates": SurrogateStage.depends_on,
    "replay": ReplayStage.depends_on,
    "fisher": FisherStage.depends_on,
    "probes": ProbeStage.depends_on,
    "training": TrainingStage.depends_on,
    "report": ReportStage.depends_on,
}
# Places, rounding and speed, what is kept on the way, and what happens afterwards.
IRRELEVANT = frozenset((
    "cache_dir", "artifacts_dir", "output_dir", "overwrite_output_dir", "sample_batch_size", "fisher_batch_size",
    "gradient_checkpointing", "enable_xformers_memory_efficient_attention", "checkpointing_steps",
    "checkpointing_minutes", "checkpoints_total_limit", "resume_from_checkpoint", "validation_prompts",
    "validation_steps", "num_validation_images", "report_to", "logging_dir", "logging_steps", "tracker_project_name",
    "push_to_hub", "hub_model_id", "hub_private_repo", "require_forgotten", "train_distilled",
    "single_file_config", "lora_format", "fuse_adapters", "fisher_on_cpu",
))  # fmt: skip

__all__ = [
    "DEPENDENCIES",
    "IRRELEVANT",
    "CardStage",
    "EvaluationImages",
    "FisherStage",
    "ProbeStage",
    "PushStage",
    "ReplayStage",
    "ReportStage",
    "Stage",
    "Subject",
    "SurrogateStage",
    "TrainingStage",
    "prepare",
]
