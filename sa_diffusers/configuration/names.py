"""Files in the folder of an erased pipeline, and of a base model."""

CONFIG_NAME = "selective_amnesia.json"
HISTORY_NAME = "training_history.json"
ENDING_NAME = "training_ending.json"
REPORT_NAME = "report.json"
GRID_NAME = "before_after.png"
FISHER_CONFIG_NAME = "fisher_config.json"
BASE_DEFAULTS_NAME = "selective_amnesia_defaults.json"
