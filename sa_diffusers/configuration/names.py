"""Files in the folder of an erased pipeline, and of a base model."""

CONFIG_NAME = "selective_amnesia.json"
HISTORY_NAME = "training_history.json"
ENDING_NAME = "training_ending.json"
MERGED_NAME = "merged_adapter.json"
REPORT_NAME = "report.json"
GRID_NAME = "before_after.png"
# What an evaluation writes.
REPORT_FILES = (REPORT_NAME, "report.md", "report.html", GRID_NAME)
FISHER_CONFIG_NAME = "fisher_config.json"
BASE_DEFAULTS_NAME = "selective_amnesia_defaults.json"
