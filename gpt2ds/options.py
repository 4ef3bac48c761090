"""What a user can ask of a training run, and the defaults with their reasons. A value of None was not asked for."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# Peak learning rates by number of parameters. From small to xl: Brown et al. 2020 (arXiv 2005.14165), table 2.1, models of
# 125M, 350M, 760M and 1.3B, all at about 0.5M tokens a step. tiny: the best of a sweep on the novels at 4k tokens a step.
PEAK_LR = {7e6: 2e-3, 124e6: 6e-4, 355e6: 3e-4, 774e6: 2.5e-4, 1558e6: 2e-4}

DEFAULTS: dict[str, tuple[Any, str]] = {
    # name: (value, reason)
    "ds": ("zero2.json", "ZeRO-2 in bf16 with fp32 gradient accumulation: the states of one card shared by all, no extra traffic"),
    "schedule": ("cosine", "linear warm-up, then half a cosine (GPT-3); wsd when the end is not known, constant to compare"),
    "warmup_fraction": (0.05, "of the steps, at most 700: GPT-3 warmed up over 375M tokens, about 700 steps of 0.5M"),
    "min_lr_ratio": (0.1, "the schedule ends at a tenth of the peak (GPT-3)"),
    "decay_fraction": (0.2, "of the steps, for warm-up-stable-decay (arXiv 2405.18392 found 10 to 20% enough)"),
    "evaluations": (20, "validation so many times over a run, at most every 500 steps, and at its start and end"),
    "evaluation_windows": (256, "windows of context + 1 tokens spread evenly over the validation text, always the same (64 on a CPU)"),
    "evaluation_micro_batch": (8, "without a backward pass 8 windows need less than one window of training"),
    "save_minutes": (30.0, "minutes between checkpoints: what a power cut can cost at most"),
    "keep": (2, "checkpoints kept: one more than needed, should the newest be damaged"),
    "seed": (1337, "of the weights, the data order and dropout"),
    "sample_prompt": ("Fruits are good for you because", "continued at every evaluation, so that progress can be read"),
    "sample_tokens": (48, "tokens of each sample"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """The options of `gpt2ds train`; None means: take the default, or what the profile says."""

    ds: str | None = None
    model: str | None = None
    models_file: Path | None = None
    data: Path | None = None
    run: str | None = None
    logs: Path = Path("logs")
    resume: bool = False
    micro_batch: int | None = None
    accumulation: int | None = None
    context: int | None = None
    recompute: str | None = None
    steps: int | None = None
    tokens: int | None = None
    hours: float | None = None
    schedule: str | None = None
    lr: float | None = None
    warmup_steps: int | None = None
    evaluate_every: int | None = None
    evaluation_windows: int | None = None
    evaluation_micro_batch: int | None = None
    save_every: int | None = None
    save_minutes: float | None = None
    keep: int | None = None
    sample_prompt: str | None = None
    sample_tokens: int | None = None
    seed: int | None = None
    gpu_memory: float | None = None

    def get(self, name: str) -> Any:
        """The value asked for, else the default."""
        value = getattr(self, name)
        return DEFAULTS[name][0] if value is None else value

    def over(self, earlier: dict[str, Any]) -> "TrainOptions":
        """These options with what was not asked for taken from an earlier run's (`to_dict`), to go on with that run."""
        types = {"models_file": Path, "data": Path}
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        merged = dict(own)
        for name, value in earlier.items():
            if name in own and own[name] is None and value is not None:
                merged[name] = types.get(name, lambda same: same)(value)
        # The end of a run is one idea with three names: asking for one of them replaces the earlier one.
        if any(own[name] is not None for name in ("steps", "tokens", "hours")):
            merged |= {name: own[name] for name in ("steps", "tokens", "hours")}
        return TrainOptions(**merged)

    def to_dict(self) -> dict[str, Any]:
        """For plan.json."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
