"""Command lines that cannot be: malformed ones of every command that there is, and values that make no sense."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, get_args

from faults.bad_input import TRAIN


def commands() -> dict[str, Callable[..., Any]]:
    """Every command that there is, with the function behind it."""
    from gpt2ds.cli import app

    functions = [(info.name, info.callback) for info in app.registered_commands]
    return {name or each.__name__.replace("_", "-"): each for name, each in functions if each is not None}


REQUIRED: dict[str, list[str]] = {"generate": ["a", "x"], "evaluate": ["a"], "report": ["a"]}
REQUIRED |= {"export": ["a", "--out", "hf"]}


def malformed() -> Iterator[list[str]]:
    """For every command: an option that is not, an argument too many or none, and no number where one belongs."""
    for name, function in sorted(commands().items()):
        words = [name, *REQUIRED.get(name, [])]
        yield [*words, "--no-such-option"]
        yield [*words, *(["--packages"] if name == "prepare" else ["one", "argument", "too", "many"])]
        if name in REQUIRED:
            yield [name]
        for parameter in inspect.signature(function).parameters.values():
            kind, about = get_args(parameter.annotation)[:2]
            if {int, float} & {kind, *get_args(kind), *(x for one in get_args(kind) for x in get_args(one))}:
                declared = [text for text in about.param_decls or () if text.startswith("--")]
                yield [*words, *(declared or [f"--{parameter.name.replace('_', '-')}"])[:1], "many"]


MALFORMED = [*malformed(), [], ["--no-such-option"], ["trian"], ["train", "train"], ["--version=3"], [""]]

ESTIMATE = ["memory-estimate", "--ds", "zero2", "--model", "gpt2_tiny"]
BENCH = ["bench", "--ds", "fp32_baseline", "--model", "small"]
NUMBERS = ["0", "-1", "nan", "inf"]
# CORPUS, MODELS and RUN stand for the ones that are sound.
SENSELESS: list[list[str]] = [
    *([*TRAIN, "--data", "CORPUS", "--models-file", "MODELS", *more] for more in (
        *(["--lr", value] for value in (*NUMBERS, "-inf")),
        *(["--hours", value] for value in NUMBERS),
        *(["--save-minutes", value] for value in NUMBERS),
        *([f"--{name}", value] for value in ("0", "-3") for name in (
            "micro-batch", "accumulation", "context", "steps", "tokens", "keep", "evaluate-every", "evaluation-windows",
            "evaluation-micro-batch", "save-every",
        )),
        *(["--gpu-memory", value] for value in (*NUMBERS, "1e-9")),
        ["--warmup-steps", "-1"],
        ["--micro-batch", "9" * 30],
        ["--context", "33"],
        ["--context", "9" * 30],
        ["--steps", "3", "--hours", "1"],
        ["--save-every", "3", "--save-minutes", "1"],
        ["--schedule", "cosin"],
        ["--recompute", "al"],
        ["--name", "../outside"],
        ["--name", "/tmp/outside"],
        ["--name", ".."],
        ["--name", "x" * 300],
        ["--out", "file.txt"],
        ["--model", "gpt2_smal"],
        ["--data", "nowhere"],
        ["--data", "file.txt"],
        ["--models-file", "nowhere.yaml"],
        ["--models-file", "file.txt"],
        ["--models-file", "huge.yaml"],
        ["--models-file", "alias.yaml"],
        ["--models-file", "object.yaml"],
        ["--resume"],
        ["--resume", "--name", "nothing"],
        ["--resume", "--name", "../../a"],
    )),
    *([*ESTIMATE, *more] for more in (
        *([f"--{name}", value] for value in ("0", "-3") for name in (
            "gpus", "nodes", "micro-batch", "accumulation", "context", "loss-chunk", "global-batch",
        )),
        *([f"--{name}", "9" * 30] for name in ("micro-batch", "accumulation", "context", "global-batch")),
        *(["--gpu-memory", value] for value in (*NUMBERS, "1e-9")),
        ["--recompute", "al"],
        ["--model", "gpt2_smal"],
        ["--models-file", "huge.yaml", "--model", "huge"],
        ["--write", "plan.json"],
        ["--fit", "--write", "nowhere/plan.json"],
        ["--fit", "--write", "file.txt"],
        ["--plot", "nowhere/plot.png"],
        ["--plot", "plot.xyz"],
    )),
    *([*BENCH, "--data", "CORPUS", "--models-file", "MODELS", *more] for more in (
        *(["--timeout", value] for value in ("0", "-1", "nan")),
        *([f"--{name}", value] for value in ("0", "-3") for name in (
            "micro-batch", "accumulation", "context", "gpus", "gpu-memory", "steps",
        )),
        ["--recompute", "al"],
        ["--data", "nowhere"],
        ["--largest"],
    )),
    *(["generate", "RUN", "Fruits", *more] for more in (
        *(["--tokens", value] for value in ("0", "-1")),
        *(["--temperature", value] for value in ("-1", "nan", "inf", "-inf")),
        ["--top-k", "-1"],
        ["--seed", "9" * 30],
    )),
    *(["evaluate", "RUN", *more] for more in (
        *([f"--{name}", value] for value in ("0", "-1") for name in ("windows", "micro-batch")),
        ["--data", "nowhere"],
        ["--data", "file.txt"],
    )),
    *(["export", "RUN", *more] for more in (
        ["--out", "full"],
        ["--out", "file.txt"],
        ["--out", "file.txt/hf"],
        ["--out", "x" * 300],
        *(["--out", "hf", "--checkpoint", name] for name in ("", "..", "../../a/checkpoints/step-00000004", "step-9")),
        ["--out", "hf", "--checkpoint", "step-00000004/"],
        ["--out", "hf", "--dtype", "int8"],
    )),
    *([command, source, *more] for source in ("nowhere", "file.txt", "full", "x" * 300, "", "loop")
      for command, *more in (["generate", "Fruits"], ["evaluate"], ["report"], ["export", "--out", "hf"])),
    *(["prepare", *more] for more in (
        ["nowhere.txt", "--out", "shards"],
        ["*.nothing", "--out", "shards"],
        ["empty.txt", "--out", "shards"],
        ["binary.bin", "--out", "shards"],
        ["file.txt"],
        ["file.txt", "--out", "file.txt"],
        ["file.txt", "--out", "file.txt/shards"],
        ["file.txt", "--out", "shards", "--packages", "torch"],
        ["--packages", "pandas", "--out", "shards"],
        ["--separator", "x", "--out", "shards"],
        *(["file.txt", "--out", "shards", "--validation", value] for value in ("-1", "2", "nan", "1", "inf")),
        *(["file.txt", "--out", "shards", "--processes", value] for value in ("0", "-1")),
        *(["file.txt", "--out", "shards", "--encoding", value] for value in ("utf-9", "", "base64")),
        ["file.txt", "--out", "shards", "--end-of-text", "maybe"],
        ["x" * 300, "--out", "shards"],
        ["file.txt", "--out", "x" * 300],
        ["loop", "--out", "shards"],
    )),
]  # fmt: skip


# Each name twice the one before: 2 to the power of 24 in all, for a reader that writes them out.
ALIASES = list(zip("abcdefghijklmnopqrstuvwxy", "bcdefghijklmnopqrstuvwxyz", strict=True))
