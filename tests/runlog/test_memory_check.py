"""Predicted beside measured, as the log, its summary and the console show it, from records as a run leaves them."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from gpt2ds.runlog.console import console_view
from gpt2ds.runlog.memory_check import MOST_DIFFERENCE, MemoryCheck
from gpt2ds.runlog.metrics import RunLog
from gpt2ds.runlog.report import write_report

GIB = 2**30
CUDA: dict[str, Any] = {
    "model": {"name": "gpt2_large"},
    "batch": {"ranks": 2},
    "devices": {"kind": "cuda", "memory_bytes": 24 * GIB},
    "memory": {"predicted_peak_bytes": 20 * GIB, "source": "formula", "parts": {"weights": 20 * GIB}},
}
CPU = CUDA | {"devices": {"kind": "cpu", "memory_bytes": 64 * GIB}}
CHECK = MemoryCheck(
    predicted_bytes=20 * GIB,
    measured_bytes=[19 * GIB, 20 * GIB + GIB // 5],
    reserved_bytes=[21 * GIB, 22 * GIB],
    outside_bytes=[GIB, 23 * GIB],
    steps=2,
)


def run_of(folder: Path, plan: dict[str, Any], steps: list[dict[str, Any]], check: MemoryCheck | None) -> str:
    """The log of a finished run, with a terminal's and a pipe's view in between."""
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "ds_config.json").write_text("{}")
    terminal, pipe = io.StringIO(), io.StringIO()
    views = [console_view(plan, terminal=True, stream=terminal), console_view(plan, terminal=False, stream=pipe)]
    with RunLog(folder, views) as log:
        log.record("start", 0, resumed_from=None)
        for number, sizes in enumerate(steps, start=1):
            log.record("step", number, loss=1.0, **sizes)
        if check:
            log.record("memory", len(steps), **check.to_dict())
        log.record("end", len(steps), reason="completed")
    (folder / "terminal").write_text(terminal.getvalue())
    (folder / "pipe").write_text(pipe.getvalue())
    return write_report(folder).read_text()


def test_a_run_on_gpus(tmp_path: Path) -> None:
    one = {"memory_bytes": [18 * GIB, 20 * GIB], "reserved_bytes": [21 * GIB, 22 * GIB], "tensor_bytes": None}
    text = run_of(tmp_path / "run", CUDA, [one] * 3, CHECK)
    assert "| predicted peak (formula) | 20.00 GiB |  | 83.3% |  |" in text
    assert "| measured, rank 0 | 19.00 GiB | 21.00 GiB | 79.2% | -5.0% |" in text
    assert "| measured, rank 1 | 20.20 GiB | 22.00 GiB | 84.2% | +1.0% |" in text
    assert "| outside of the steps, at most | 23.00 GiB |  | 95.8% |  |" in text
    assert "Measured in the last 2 steps." in text
    assert "| Peak memory | 23.00 GiB on rank 1, 95.8% of the device's 24.00 GiB |" in text
    line = "predicted 20.00 GiB | measured 20.20 GiB on rank 1 (+1.0%) | reserved 22.00 GiB"
    assert f"| Memory in the steps | {line.replace(' | ', ', ')} |" in text
    assert f"memory in the steps: {line}\ncompleted at step 3" in (tmp_path / "run" / "pipe").read_text()
    assert "measured 20.20 GiB on rank 1 (+1.0%)" in (tmp_path / "run" / "terminal").read_text()


def test_a_run_on_cpus_whose_tensors_were_counted(tmp_path: Path) -> None:
    one = {"memory_bytes": [30 * GIB, 31 * GIB], "reserved_bytes": None, "tensor_bytes": [19 * GIB, 20 * GIB]}
    check = MemoryCheck.of(CHECK.to_dict() | {"reserved_bytes": None})
    text = run_of(tmp_path / "run", CPU, [one] * 3, check)
    assert "| | tensors | resident | of the host's 64.00 GiB | against the prediction |" in text.replace("|  |", "| |")
    assert "| measured, rank 1 | 20.20 GiB | 31.00 GiB | 48.4% | +1.0% |" in text
    assert "| Peak memory | 61.00 GiB resident in all ranks together, 95.3% of the host's 64.00 GiB |" in text
    # A session that is still running has its steps alone.
    text = run_of(tmp_path / "running", CPU, [one] * 3, None)
    assert "| measured, rank 1 | 20.00 GiB | 31.00 GiB | 48.4% | +0.0% |" in text
    assert "Memory in the steps" not in text


def test_a_run_on_cpus_that_nobody_watched(tmp_path: Path) -> None:
    one = {"memory_bytes": [30 * GIB, 31 * GIB], "reserved_bytes": None, "tensor_bytes": None}
    text = run_of(tmp_path / "run", CPU | {"memory": {"predicted_peak_bytes": None}}, [one] * 3, None)
    assert "| measured, rank 1 | 31.00 GiB | 48.4% |" in text
    assert "prediction |" not in text


@pytest.mark.parametrize("sign", [1, -1])
def test_only_more_than_3_percent_are_an_incident(sign: int) -> None:
    for difference, wrong in ((MOST_DIFFERENCE - 1e-4, False), (MOST_DIFFERENCE + 1e-4, True)):
        measured = round(20 * GIB * (1 + sign * difference))
        check = MemoryCheck.of(CHECK.to_dict() | {"measured_bytes": [measured, GIB]})
        assert check is not None and bool(check.incident()) is wrong
    assert check.incident() == (
        f"The predicted memory of 20.00 GiB and the measured {measured / GIB:.2f} GiB on rank 0 differ by "
        f"{'+' if sign > 0 else '-'}3.0%: please report this to the maintainers of gpt2ds, with plan.json, "
        "ds_config.json and metrics.jsonl from the run folder."
    )


def test_a_record_of_another_program_is_passed_over() -> None:
    assert MemoryCheck.of({"kind": "memory", "predicted_bytes": 1}) is None
