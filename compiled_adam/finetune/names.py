"""The files in the folder of a run."""

from __future__ import annotations

CONFIG, WEIGHTS, LOG, RECORD = "adapter_config.json", "adapters.safetensors", "log.jsonl", "run.json"
REPORT = "report.html"
BEST_LOSS = "best.json"  # in the folder best
CHECKPOINTS, BEST, PREVIOUS = "checkpoints", "best", "previous"  # folders; earlier runs are in previous-1 and so on
