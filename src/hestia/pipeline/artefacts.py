"""The names of what a run leaves in its folder."""

OPTIONS_FILE, PLAN_FILE, SENSITIVITY_FILE = "run.yaml", "plan.json", "sensitivity.json"
SCORES_FILE, REPORT_FILE, DIAGNOSTICS_FILE = "scores.json", "report.json", "diagnostics.json"
TRAINING_FILE, TIMING_FILE = "training.json", "timing.json"
EXPORTS_FOLDER, CACHE_FOLDER = "exports", "cache"
EXPORTS_FILE = "exports.json"
"""Entries of the files that are written, until report.json has them."""
INPUTS_FILE, PARTIAL_FILE = "inputs.json", "sensitivity.partial.safetensors"
