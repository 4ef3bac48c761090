"""What a user can ask of a training run, and the defaults with their reasons. A value of None was not asked for."""

import shlex
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from gpt2ds.errors import UserError

# Peak learning rates by number of parameters. From small to xl: Brown et al. 2020 (arXiv 2005.14165), table 2.1, models
# of 125M, 350M, 760M and 1.3B, all at about 0.5M tokens a step. tiny: the best of a sweep on the novels at 4k tokens a
# step.
PEAK_LR = {7e6: 2e-3, 124e6: 6e-4, 355e6: 3e-4, 774e6: 2.5e-4, 1558e6: 2e-4}

DEFAULTS: dict[str, tuple[Any, str]] = {
    # name: (value, reason)
    "ds": (
        "zero2.json",
        "bf16, fp32 gradient accumulation, and the states of one card shared by all at no extra traffic",
    ),
    "schedule": ("cosine", "linear warm-up, then half a cosine (GPT-3); wsd when the end is open, constant to compare"),
    "warmup_fraction": (0.05, "of the steps, at most 700: GPT-3 warmed up over 375M tokens, about 700 steps of 0.5M"),
    "min_lr_ratio": (0.1, "the schedule ends at a tenth of the peak (GPT-3)"),
    "decay_fraction": (0.2, "of the steps, for warm-up-stable-decay (arXiv 2405.18392 found 10 to 20% enough)"),
    "evaluations": (20, "validation so many times over a run, at most every 500 steps, and at its start and end"),
    "evaluation_windows": (256, "windows spread evenly over the validation text, always the same ones (64 on a CPU)"),
    "evaluation_micro_batch": (8, "without a backward pass 8 windows need less than one window of training"),
    "save_minutes": (30.0, "minutes between checkpoints: what a power cut can cost at most"),
    "keep": (2, "newest checkpoints kept: one more than needed, should one be damaged; the best one stays as well"),
    "rank_timeout": (10.0, "minutes without a micro-batch or a saved tensor, after which a rank counts as hung"),
    "seed": (1337, "of the weights, the data order and dropout"),
    "sample_prompt": ("Fruits are good for you because", "continued at every evaluation, so that progress can be read"),
    "sample_tokens": (48, "tokens of each sample"),
}


WHAT = "What to train"
BATCH = "Batch and memory"
LENGTH = "How long and how fast"
CARE = "Evaluation and checkpoints"


def option(panel: str, metavar: str, text: str) -> Any:
    """A field of TrainOptions that is also an option of `gpt2ds train`, with what `--help` says of it."""
    return field(default=None, metadata={"panel": panel, "metavar": metavar, "help": text})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """The options of `gpt2ds train`; None means: take the default, or what the profile says."""

    ds: str | None = option(WHAT, "JSON", "DeepSpeed profile: a file, or the name of a shipped one.")
    model: str | None = option(
        WHAT,
        "NAME",
        "gpt2_tiny, _small, _medium, _large or _xl. Default: the largest predicted to fit; tiny on a CPU.",
    )
    models_file: Path | None = option(WHAT, "YAML", "Sizes of your own, under a section 'models:'.")
    data: Path | None = option(
        WHAT, "FOLDER", "What `gpt2ds prepare` wrote, or llm.c or nanoGPT shards. Default: the embedded text."
    )
    name: str | None = option(WHAT, "NAME", "Name of the run folder. Default: date and time.")
    out: Path = field(
        default=Path("logs"), metadata={"panel": WHAT, "metavar": "FOLDER", "help": "Where run folders are."}
    )
    resume: bool = field(
        default=False,
        metadata={
            "panel": WHAT,
            "metavar": None,
            "help": "Go on with --name, or the newest run, from its newest checkpoint.",
        },
    )
    micro_batch: int | None = option(BATCH, "N", "Sequences per rank at a time. Default: the profile's.")
    accumulation: int | None = option(BATCH, "N", "Micro-batches per optimizer step. Default: the profile's.")
    context: int | None = option(BATCH, "TOKENS", "Tokens per sequence. Default: the model's.")
    recompute: str | None = option(
        BATCH,
        "POLICY",
        "Activation checkpointing: none, products, alternate, narrow, attention, full or host. Default: the profile's.",
    )
    gpu_memory: float | None = option(
        BATCH, "GB", "Train as if on a card of so many GB: 24 caps the allocator at 23,700 MiB."
    )
    watch_memory: bool = field(
        default=False,
        metadata={
            "panel": BATCH,
            "metavar": None,
            # Measured on an AMD EPYC, one core, zero2: 0.22 s became 0.32 s a micro-batch of 1, 1.11 s 1.16 s of 8.
            "help": "On a CPU: count the bytes of all tensors, to compare them with the prediction. Takes about 0.1 s "
            "a micro-batch of gpt2_tiny. On CUDA the allocator counts anyway.",
        },
    )
    steps: int | None = option(LENGTH, "N", "End after N optimizer steps. Default: one pass over the text.")
    tokens: int | None = option(LENGTH, "N", "End after N tokens.")
    hours: float | None = option(LENGTH, "H", "End after H hours; the schedule is fitted to the measured speed.")
    schedule: str | None = option(LENGTH, "KIND", "cosine, wsd (warm-up, stable, decay) or constant.")
    lr: float | None = option(LENGTH, "RATE", "Peak learning rate. Default: by model size.")
    warmup_steps: int | None = option(LENGTH, "N", "Steps of linear warm-up. Default: 5% of the steps, at most 700.")
    evaluate_every: int | None = option(CARE, "STEPS", "Steps between evaluations. Default: 20 over the run.")
    evaluation_windows: int | None = option(CARE, "N", "Validation windows looked at.")
    evaluation_micro_batch: int | None = option(CARE, "N", "Validation windows at a time.")
    sample_prompt: str | None = option(CARE, "TEXT", "Continued at every evaluation.")
    sample_tokens: int | None = option(CARE, "N", "Tokens of each sample.")
    save_every: int | None = option(CARE, "STEPS", "Steps between checkpoints, instead of minutes.")
    save_minutes: float | None = option(CARE, "MIN", "Minutes between checkpoints.")
    keep: int | None = option(CARE, "N", "Newest checkpoints kept; the best by validation loss stays as well.")
    rank_timeout: float | None = option(CARE, "MIN", "A rank that does not move for so long ends the run.")
    seed: int | None = option(CARE, "N", "Of weights, data order and dropout.")

    def get(self, name: str) -> Any:
        """The value asked for, else the default."""
        value = getattr(self, name)
        return DEFAULTS[name][0] if value is None else value

    def over(self, earlier: dict[str, Any]) -> "TrainOptions":
        """These options with what was not asked for taken from an earlier run's (`to_dict`), to go on with that run.

        Raises UserError when one of those is no value of its option: the file may have been edited.
        """
        kinds = get_type_hints(TrainOptions)
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        merged = dict(own)
        for name, value in earlier.items():
            if name in own and own[name] is None and value is not None:
                merged[name] = _as_option(name, value, get_args(kinds[name])[0])
        # One idea with several names each: asking for one of them replaces the earlier one.
        for names in (("steps", "tokens", "hours"), ("save_every", "save_minutes")):
            if any(own[name] is not None for name in names):
                merged |= {name: own[name] for name in names}
        return TrainOptions(**merged)

    def command(self, ranks: int) -> str:
        """What a user types to ask for the same again, on so many ranks."""
        words = ["gpt2ds", "train"]
        for name, value in self.to_dict().items():
            flag = f"--{name.replace('_', '-')}"
            if value is True:
                words.append(flag)
            elif value not in (None, False) and (name, value) != ("out", "logs"):
                words += [flag, str(value)]
        return shlex.join([*words, *(["--gpus", str(ranks)] if ranks > 1 else [])])

    def to_dict(self) -> dict[str, Any]:
        """For plan.json."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def _as_option(name: str, value: Any, kind: type) -> Any:
    """A value from JSON as the option holds it."""
    accepted: Any = {Path: str, float: (int, float)}.get(kind, kind)
    sound = isinstance(value, accepted) and not isinstance(value, bool) and value != ""
    if not sound or (isinstance(value, int) and abs(value) >= 2**63) or (isinstance(value, str) and "\0" in value):
        raise UserError(
            f"The run's plan.json has {value!r:.60} for the option --{name.replace('_', '-')}: give that option anew."
        )
    return Path(value) if kind is Path else value
