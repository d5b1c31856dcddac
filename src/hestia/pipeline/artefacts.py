"""The names of what a run leaves in its folder."""

OPTIONS_FILE, PLAN_FILE, SENSITIVITY_FILE = "run.yaml", "plan.json", "sensitivity.json"
SCORES_FILE, REPORT_FILE, DIAGNOSTICS_FILE = "scores.json", "report.json", "diagnostics.json"
TRAINING_FILE, TIMING_FILE = "training.json", "timing.json"
EXPORTS_FOLDER, CACHE_FOLDER = "exports", "cache"
