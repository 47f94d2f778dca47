"""Settings: dataclasses behind the command line, YAML files and saved JSON."""

from .base_training import ClassifierConfig, ClassModelConfig
from .erasure import SelectiveAmnesiaConfig, base_defaults, check_names, inherited_defaults, read_settings
from .evaluation import EvaluationConfig
from .fields import Settings, default_of, flag, flag_type, flags_of, group_of, help_text, type_name
from .groups import LR_SCHEDULERS, SAMPLERS
from .names import (
    BASE_DEFAULTS_NAME,
    CONFIG_NAME,
    ENDING_NAME,
    FISHER_CONFIG_NAME,
    GRID_NAME,
    HISTORY_NAME,
    MERGED_NAME,
    REPORT_FILES,
    REPORT_NAME,
)
from .reading import experiments

__all__ = [
    "BASE_DEFAULTS_NAME",
    "CONFIG_NAME",
    "ENDING_NAME",
    "FISHER_CONFIG_NAME",
    "GRID_NAME",
    "HISTORY_NAME",
    "MERGED_NAME",
    "LR_SCHEDULERS",
    "REPORT_FILES",
    "REPORT_NAME",
    "SAMPLERS",
    "ClassModelConfig",
    "ClassifierConfig",
    "EvaluationConfig",
    "SelectiveAmnesiaConfig",
    "Settings",
    "base_defaults",
    "check_names",
    "default_of",
    "experiments",
    "flag",
    "flag_type",
    "flags_of",
    "group_of",
    "help_text",
    "inherited_defaults",
    "read_settings",
    "type_name",
]
