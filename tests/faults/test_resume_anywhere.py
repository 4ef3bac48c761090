"""One run whose sessions have other ranks, ZeRO stages and micro-batches: the same losses, every sequence once.

That states go from any stage to any other without a bit changed is tested in tests/training/test_stages.py.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support import PROFILES, cpu_environment, free_port

from gpt2ds.corpus.batches import Windows
from gpt2ds.corpus.shards import open_corpus

GLOBAL_BATCH = 8
STEPS = 50


def session(folder: Path, models_file: Path, corpus: Path, *, ranks: int, ds: str, steps: int, **more: Any) -> None:
    """A session of the run `a` in this folder, to its end; a first one, or one that goes on."""
    options: dict[str, Any] = {
        **{"ds": ds, "models_file": models_file, "name": "a", "steps": steps, "save_every": 10},
        **({"resume": None} if (folder / "logs" / "a").exists() else {"model": "small", "data": corpus}),
        **{"schedule": "constant", "warmup_steps": 5, "lr": 1e-3},
        **{"evaluate_every": 1000, "evaluation_windows": 1, "sample_tokens": 1, **more},
    }
    words = ["train"]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *([str(value)] if value is not None else [])]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    group["COUNT_FILE"] = str(folder / "count")
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("counting_cli.py")), *words],
            cwd=folder,
            env=cpu_environment(RANK=str(rank), LOCAL_RANK=str(rank), **group),
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"err-{rank}").open("w"),
        )
        for rank in range(ranks)
    ]
    try:
        codes = [process.wait(120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, [(folder / f"err-{rank}").read_text() for rank in range(ranks)]


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "logs" / "a" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines) if record["kind"] == "step"}


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The shipped profiles of ZeRO-2 and 3, in fp32."""
    folder = tmp_path_factory.mktemp("profiles")
    paths = {}
    for stage in (2, 3):
        profile = json.loads((PROFILES / f"zero{stage}.json").read_text(encoding="utf-8"))
        del profile["bf16"]
        path = folder / f"zero{stage}_fp32.json"
        path.write_text(json.dumps(profile), encoding="utf-8")
        paths[stage] = str(path)
    return paths


def test_other_ranks_stages_and_micro_batches_go_on_with_the_same_run(
    tmp_path: Path, models_file: Path, corpus_folder: Path, profiles: dict[int, str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    common = (models_file, corpus_folder)
    session(whole, *common, ranks=2, ds=profiles[2], steps=STEPS, micro_batch=2, accumulation=2)
    session(broken, *common, ranks=2, ds=profiles[2], steps=10, micro_batch=2, accumulation=2)
    # On one card at ZeRO-3: the accumulation follows from the global batch.
    session(broken, *common, ranks=1, ds=profiles[3], steps=30)
    session(broken, *common, ranks=2, ds=profiles[2], steps=STEPS, micro_batch=1)

    plan = json.loads((broken / "logs" / "a" / "plan.json").read_text(encoding="utf-8"))
    assert (plan["batch"]["micro_batch"], plan["batch"]["accumulation"], plan["batch"]["ranks"]) == (1, 4, 2)
    expected, found = losses(whole), losses(broken)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    assert [found[step] for step in range(1, 11)] == [expected[step] for step in range(1, 11)]
    for step in range(11, STEPS + 1):
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step

    seen = [line.split() for path in broken.glob("count-*") for line in path.read_text(encoding="ascii").splitlines()]
    assert sorted(int(position) for position, _ in seen) == list(range(STEPS * GLOBAL_BATCH))
    count = len(Windows(open_corpus(corpus_folder).train, 32))
    epoch = Counter(int(number) for position, number in seen if int(position) < count)
    assert max(epoch.values()) == 1
    assert len(epoch) == min(count, STEPS * GLOBAL_BATCH)
