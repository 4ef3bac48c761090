"""Numbers that go wrong in whole runs of two ranks: the return to a checkpoint, the data passed over, the diagnosis.

That a NaN never reaches a weight at any ZeRO stage is tested in tests/training/test_stages.py.
"""

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import end_ranks, start_ranks

from gpt2ds.training.data_position import DataPosition
from gpt2ds.training.health import LEAD_STEPS, NOISE_STEPS, NON_FINITE_STEPS_MOST, SPIKE_STEPS, Health

GLOBAL_BATCH = 4
SAVE_EVERY = 5
FIRST_BAD = 13


def run_faulty(
    folder: Path, models_file: Path, corpus: Path, fault: dict[str, Any], *, ds: str, steps: int
) -> tuple[list[subprocess.CompletedProcess[str]], Path]:
    """Both ranks of a run `a` with a fault, to their end."""
    arguments = [
        *("train", "--ds", ds, "--model", "tiny", "--models-file", models_file, "--data", corpus, "--name", "a"),
        *("--micro-batch", 1, "--accumulation", 2, "--steps", steps, "--save-every", SAVE_EVERY),
        *("--evaluate-every", 1000, "--evaluation-windows", 1, "--sample-tokens", 1),
    ]
    program = [Path(__file__).with_name("faulty_cli.py"), *arguments]
    results = end_ranks(start_ranks(program, cwd=folder, FAULT=json.dumps(fault)), cwd=folder)
    return results, folder / "logs" / "a"


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.parametrize(("kind", "ds"), [("data", "zero2"), ("gradient", "zero3"), ("loss", "zero1")])
def test_data_that_gives_nans_is_passed_over(
    tmp_path: Path, models_file: Path, corpus_folder: Path, kind: str, ds: str
) -> None:
    # For one step more than is borne. The checkpoint before the first suspect step is the first one.
    last = FIRST_BAD - 1 + NON_FINITE_STEPS_MOST
    bad = {"kind": kind, "rank": 1, "from": (FIRST_BAD - 1) * GLOBAL_BATCH, "to": (last + 1) * GLOBAL_BATCH}
    results, run = run_faulty(tmp_path, models_file, corpus_folder, bad, ds=ds, steps=last + 3)
    assert [result.returncode for result in results] == [0, 0], results
    (back,) = records(run, "return")
    assert (back["resumed_from"], back["step"], back["from_step"]) == ("step-00000005", 5, last)
    told = [record["what"] for record in records(run, "incident")]
    suspect = FIRST_BAD - LEAD_STEPS
    assert any(f"passes over the sequences of steps {suspect} to {last}" in what for what in told), told
    steps = records(run, "step")
    after = steps[next(i for i, record in enumerate(steps) if record["step"] == last) + 1 :]
    # Back to 6 and 7 on their own data, one step on the last of the bad data, then to the end.
    assert suspect == 8
    assert [record["step"] for record in after] == list(range(6, last + 4))
    before = {record["step"]: record["loss"] for record in steps[:7]}
    assert [record["loss"] for record in after[:2]] == pytest.approx([before[6], before[7]], abs=1e-6)
    assert [record["step"] for record in after if not isinstance(record["loss"], float)] == (
        [] if kind == "gradient" else [8]
    )
    assert records(run, "end")[-1]["reason"] == "completed"
    assert "went back to step-00000005" in (run / "training_log.md").read_text(encoding="utf-8")
    manifest = json.loads((sorted((run / "checkpoints").glob("step-*"))[-1] / "manifest.json").read_text())
    assert manifest["position"]["passed_over"] == [[7 * GLOBAL_BATCH, last * GLOBAL_BATCH]]
    assert manifest["position"]["sequences_seen"] == (last + 3 + last - 7) * GLOBAL_BATCH


@pytest.mark.parametrize("ds", ["zero2", "zero3"])  # nothing recomputed, and every block
def test_what_no_return_helps_ends_with_a_diagnosis(
    tmp_path: Path, models_file: Path, corpus_folder: Path, ds: str
) -> None:
    bad = {"kind": "data", "rank": 1, "from": 7 * GLOBAL_BATCH, "to": 10**9}
    results, run = run_faulty(tmp_path, models_file, corpus_folder, bad, ds=ds, steps=1000)
    assert [result.returncode for result in results] == [1, 1], results
    assert all("Traceback" not in result.stderr for result in results), results
    assert len(records(run, "return")) == 3
    (diagnosis,) = records(run, "diagnosis")
    assert diagnosis["first_bad"] == "the output of h.0.ln_1 on rank 1"  # that of wte is spoilt behind our back
    assert diagnosis["bad_weights"] == []
    assert set(diagnosis["gradient_norms"]) == {"wte", "wpe", "h.0", "h.1", "ln_f"}
    end = records(run, "end")[-1]["reason"]
    assert end == "failed: the gradient was not finite in 25 steps in a row"
    log = (run / "training_log.md").read_text(encoding="utf-8")
    assert "Diagnosis: learning rate" in log and "the output of h.0.ln_1 on rank 1" in log
    assert "3 returns did not help" in log


def test_a_loss_that_jumps_is_gone_back_from(tmp_path: Path, models_file: Path, corpus_folder: Path) -> None:
    first = NOISE_STEPS + 7
    bad = {"kind": "high", "rank": 0, "from": (first - 1) * GLOBAL_BATCH, "to": (first + SPIKE_STEPS) * GLOBAL_BATCH}
    results, run = run_faulty(tmp_path, models_file, corpus_folder, bad, ds="fp32_baseline", steps=first + 8)
    assert [result.returncode for result in results] == [0, 0], results
    (back,) = records(run, "return")
    assert back["from_step"] == first + SPIKE_STEPS - 1
    assert back["resumed_from"] == f"step-{(first - LEAD_STEPS - 1) // SAVE_EVERY * SAVE_EVERY:08d}"


def test_an_update_that_ruins_the_weights_is_gone_back_from(
    tmp_path: Path, models_file: Path, corpus_folder: Path
) -> None:
    """Its own loss is good, and so is that of the checkpoint that follows upon it."""
    ruinous = (NOISE_STEPS // SAVE_EVERY + 2) * SAVE_EVERY
    bad = {"kind": "update", "rank": 0, "from": (ruinous - 1) * GLOBAL_BATCH, "to": ruinous * GLOBAL_BATCH}
    results, run = run_faulty(tmp_path, models_file, corpus_folder, bad, ds="fp32_baseline", steps=ruinous + 10)
    assert [result.returncode for result in results] == [0, 0], results
    (back,) = records(run, "return")
    assert back["from_step"] == ruinous + SPIKE_STEPS
    assert back["resumed_from"] == f"step-{ruinous - SAVE_EVERY:08d}"
    assert records(run, "end")[-1]["reason"] == "completed"


def test_one_odd_batch_is_no_spike_and_noise_is_none_either() -> None:
    health = Health()
    noise = [0.05 * math.sin(37 * step) for step in range(395)]
    for step, wobble in enumerate(noise):
        loss = 4.0 + wobble + (3.0 if step % 100 == 99 else 0.0)
        assert health.saw(loss, taken=True) is None
    assert [health.saw(6.0, taken=True) is not None for _ in range(SPIKE_STEPS)] == [False] * (SPIKE_STEPS - 1) + [True]
    assert health.steps_in_trouble == SPIKE_STEPS


def test_every_sequence_is_seen_once_or_passed_over() -> None:
    data = DataPosition(4)
    seen: list[int] = []

    def steps(count: int) -> None:
        for _ in range(count):
            seen.append(data.next_step())
            data.advance()

    steps(10)
    assert data.of_steps(3) == (28, 40)
    bad = data.of_steps(3)
    data = DataPosition(4, 5 * 4, data.passed_over)  # back to the checkpoint of step 5
    data.pass_over(*bad)
    del seen[5:]
    steps(8)
    assert seen == [0, 4, 8, 12, 16, 20, 24, 40, 44, 48, 52, 56, 60]
    data = DataPosition(4, 24, data.passed_over)
    data.pass_over(40, 48)  # once more, right behind the first
    seen.clear()
    steps(3)
    assert seen == [24, 48, 52]
