"""One run whose sessions have other ranks, ZeRO stages and micro-batches: the same losses, every sequence once.

That states go from any stage to any other without a bit changed is tested in tests/training/test_stages.py.
"""

import json
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from support import end_ranks, start_ranks

from gpt2ds.corpus.batches import Windows
from gpt2ds.corpus.prepare import PrepareOptions, prepare
from gpt2ds.corpus.shards import open_corpus

GLOBAL_BATCH = 8
CONTEXT_LENGTH = 16  # of `tiny`
STEPS = 50


def session(folder: Path, models_file: Path, corpus: Path, *, ranks: int, ds: Path, steps: int, **more: Any) -> None:
    """A session of the run `a` in this folder, to its end; a first one, or one that goes on."""
    options: dict[str, Any] = {
        **{"ds": ds, "models_file": models_file, "name": "a", "steps": steps, "save_every": 10},
        **({"resume": None} if (folder / "logs" / "a").exists() else {"model": "tiny", "data": corpus}),
        **{"schedule": "constant", "warmup_steps": 5, "lr": 1e-3},
        **{"evaluate_every": 1000, "evaluation_windows": 1, "sample_tokens": 1, **more},
    }
    words = ["train"]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *([str(value)] if value is not None else [])]
    program = [Path(__file__).with_name("counting_cli.py"), *words]
    started = start_ranks(program, cwd=folder, ranks=ranks, COUNT_FILE=str(folder / "count"))
    results = end_ranks(started, cwd=folder)
    assert [result.returncode for result in results] == [0] * ranks, results


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "logs" / "a" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines) if record["kind"] == "step"}


def test_other_ranks_stages_and_micro_batches_go_on_with_the_same_run(
    tmp_path: Path, models_file: Path, fp32_profiles: dict[int, Path]
) -> None:
    text, shards = tmp_path / "text.txt", tmp_path / "corpus"
    text.write_text(topics["typesmapping"][:9_000], encoding="utf-8")  # more than two epochs
    prepare([str(text)], shards, options=PrepareOptions(validation_fraction=0.1, processes=1))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    common = (models_file, shards)
    session(whole, *common, ranks=2, ds=fp32_profiles[2], steps=STEPS, micro_batch=2, accumulation=2)
    session(broken, *common, ranks=2, ds=fp32_profiles[2], steps=10, micro_batch=2, accumulation=2)
    # On one card at ZeRO-3: the accumulation follows from the global batch.
    session(broken, *common, ranks=1, ds=fp32_profiles[3], steps=30)
    session(broken, *common, ranks=2, ds=fp32_profiles[2], steps=STEPS, micro_batch=1)

    plan = json.loads((broken / "logs" / "a" / "plan.json").read_text(encoding="utf-8"))
    assert (plan["batch"]["micro_batch"], plan["batch"]["accumulation"], plan["batch"]["ranks"]) == (1, 4, 2)
    expected, found = losses(whole), losses(broken)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    assert [found[step] for step in range(1, 11)] == [expected[step] for step in range(1, 11)]
    for step in range(11, STEPS + 1):
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step

    seen = [line.split() for path in broken.glob("count-*") for line in path.read_text(encoding="ascii").splitlines()]
    assert sorted(int(position) for position, _ in seen) == list(range(STEPS * GLOBAL_BATCH))
    count = len(Windows(open_corpus(shards).train, CONTEXT_LENGTH))
    numbers = [number for _, number in sorted((int(position), int(number)) for position, number in seen)]
    epochs = [numbers[start : start + count] for start in range(0, len(numbers), count)]
    assert len(epochs) >= 3, "the second session begins in one epoch and ends in another, and so does the third"
    for epoch in epochs:
        assert max(Counter(epoch).values()) == 1
    assert [len(epoch) for epoch in epochs[:-1]] == [count] * (len(epochs) - 1)
    assert epochs[0] != epochs[1]
