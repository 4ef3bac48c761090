"""Training speed beside nanoGPT's train.py: same machine, model shape, data and batch, one rank, no compile.

    python benchmarks/nanogpt_speed.py PATH_OF_A_NANOGPT_CHECKOUT [--rounds 3] [--steps 12]

Runs nanoGPT (fp32, which is what it does on a CPU whatever its --dtype), gpt2ds in fp32 (fp32_baseline.json) and
gpt2ds in bf16 (zero2.json) in turn, several rounds, each in a fresh process, and compares the median step of every run.
"""

import argparse
import json
import os
import pickle
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gpt2ds.corpus.embedded import prepare_embedded
from gpt2ds.corpus.shards import read_shard
from gpt2ds.devices import this_machine

RESULTS = Path(__file__).parent / "results"

LAYERS, WIDTH, HEADS, CONTEXT, MICRO_BATCH, ACCUMULATION = 4, 256, 8, 512, 4, 2
TOKENS_PER_STEP = CONTEXT * MICRO_BATCH * ACCUMULATION
WARM_UP_STEPS = 3

MODEL = f"""
models:
  shape:
    emb_dim: {WIDTH}
    n_heads: {HEADS}
    n_layers: {LAYERS}
    context_length: {CONTEXT}
    qkv_bias: true
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    if not (arguments.nanogpt / "train.py").is_file():
        sys.exit(f"{arguments.nanogpt} holds no train.py: give the path of a nanoGPT checkout.")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = prepare_embedded(folder / "shards")
        # nanoGPT's format of the same tokens, with the vocabulary size that it would otherwise round up.
        read_shard(corpus.train[0].path).tofile(folder / "train.bin")
        read_shard(corpus.val[0].path).tofile(folder / "val.bin")
        (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": corpus.vocab_size}))
        (folder / "models.yaml").write_text(MODEL, encoding="utf-8")
        contenders: dict[str, Callable[[], float]] = {
            "nanoGPT fp32": lambda: nanogpt_step_seconds(arguments.nanogpt.resolve(), folder, arguments.steps),
            "gpt2ds fp32": lambda: gpt2ds_step_seconds("fp32_baseline", folder, arguments.steps),
            "gpt2ds bf16": lambda: gpt2ds_step_seconds("zero2", folder, arguments.steps),
        }
        seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
        for round_ in range(arguments.rounds):
            for contender, run in contenders.items():
                seconds[contender].append(run())
                print(f"round {round_ + 1}  {contender:13} {TOKENS_PER_STEP / seconds[contender][-1]:8,.0f} tokens/s")

    baseline = seconds["nanoGPT fp32"]
    machine = this_machine()
    result: dict[str, Any] = {
        "what": "tokens/s of training, median step of each fresh process",
        "machine": {"cpu": machine.cpu_name, "cores": machine.cores, "gpu": None},
        "versions": {"python": platform.python_version(), "torch": _version("torch"), "numpy": np.__version__},
        "nanogpt_commit": _commit(arguments.nanogpt),
        "shape": {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "context": CONTEXT, "sequences": MICRO_BATCH},
        "accumulation": ACCUMULATION,
        "contenders": {
            contender: {
                "tokens_per_second": [round(TOKENS_PER_STEP / second, 1) for second in values],
                # Round by round, so that a machine whose speed drifts does not decide.
                "times_nanogpt": [round(theirs / ours, 3) for theirs, ours in zip(baseline, values, strict=True)],
                "median_times_nanogpt": round(
                    statistics.median(theirs / ours for theirs, ours in zip(baseline, values, strict=True)), 3
                ),
            }
            for contender, values in seconds.items()
        },
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "nanogpt_speed.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for contender, figures in result["contenders"].items():
        print(f"{contender:13} {figures['median_times_nanogpt']:.2f} times nanoGPT")


def nanogpt_step_seconds(checkout: Path, folder: Path, steps: int) -> float:
    """The median step of nanoGPT, from the times that it prints."""
    options = {
        "device": "cpu",
        "compile": False,
        "dataset": folder,
        "out_dir": folder / "out",
        "n_layer": LAYERS,
        "n_embd": WIDTH,
        "n_head": HEADS,
        "block_size": CONTEXT,
        "batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "bias": True,
        "dropout": 0.0,
        "max_iters": steps,
        "eval_iters": 1,
        "eval_interval": 100_000,
        "log_interval": 1,
    }
    command = [sys.executable, "train.py", *(f"--{name}={value}" for name, value in options.items())]
    printed = subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True).stdout
    times = [float(time) / 1000 for time in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", printed)]
    assert len(times) == steps + 1, printed
    return statistics.median(times[WARM_UP_STEPS:])


def gpt2ds_step_seconds(profile: str, folder: Path, steps: int) -> float:
    """The median step of gpt2ds, from its metrics."""
    run = f"{profile}-{len(list((folder / 'logs').glob('*')))}"
    options = {
        "ds": profile,
        "models-file": folder / "models.yaml",
        "model": "shape",
        "data": folder / "shards",
        "out": folder / "logs",
        "name": run,
        "micro-batch": MICRO_BATCH,
        "accumulation": ACCUMULATION,
        "steps": steps,
        "evaluation-windows": 1,
        "evaluate-every": 100_000,
        "sample-tokens": 1,
    }
    command = [sys.executable, "-m", "gpt2ds", "train"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    lines = (folder / "logs" / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    times: list[float] = [record["step_seconds"] for record in map(json.loads, lines) if record["kind"] == "step"]
    return statistics.median(times[WARM_UP_STEPS:])


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _commit(checkout: Path) -> str | None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


if __name__ == "__main__":
    main()
