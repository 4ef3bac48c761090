"""What a run leaves behind: `metrics.jsonl` is the truth; console, plots and training log are views of it."""
