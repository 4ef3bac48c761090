"""metrics.jsonl: what is written comes back, whatever the power does; resumes supersede what came after them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2ds.runlog.metrics import History, NullLog, RunLog, duration, gib, perplexity, read_records, short_count


class Listener:
    """A view that keeps what it is shown, or breaks at a given record."""

    def __init__(self, break_at: int | None = None) -> None:
        self.records: list[dict[str, Any]] = []
        self.break_at = break_at
        self.closed = 0

    def show(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if len(self.records) == self.break_at:
            raise BrokenPipeError("nobody reads")

    def close(self) -> None:
        self.closed += 1


def records_of(folder: Path) -> list[dict[str, Any]]:
    return read_records(folder / "metrics.jsonl")


def test_a_record_is_one_line_on_disk_at_once_and_goes_to_every_view(tmp_path: Path) -> None:
    first, second = Listener(), Listener()
    log = RunLog(tmp_path / "logs" / "run", [first, second])
    log.record("step", 3, loss=np.float32(2.5), memory_bytes=[1, 2], tokens=np.int64(7), mfu=None)
    log.record("sample", 3, prompt="a", text="line\nbreak \u2028 ü \ud800")
    lines = (tmp_path / "logs" / "run" / "metrics.jsonl").read_text("ascii").splitlines()  # before close: flushed
    assert len(lines) == 2
    assert records_of(tmp_path / "logs" / "run") == first.records == second.records
    step = first.records[0]
    assert (step["kind"], step["step"], step["loss"], step["tokens"], step["mfu"]) == ("step", 3, 2.5, 7, None)
    assert len(step["time"]) == 20 and step["time"].endswith("Z")
    log.close()
    log.close()
    assert first.closed == second.closed == 1


def test_what_is_not_finite_stays_valid_json_and_comes_back(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.record("step", 1, loss=math.nan, grad_norm=math.inf, lr=-math.inf, memory_bytes=[math.nan])
        log.record("sample", 1, prompt="inf", text="nan")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    step, sample = records_of(tmp_path)
    assert math.isnan(step["loss"]) and step["grad_norm"] == math.inf and step["lr"] == -math.inf
    assert (sample["prompt"], sample["text"]) == ("inf", "nan")


@pytest.mark.parametrize("torn", [b'{"kind": "step", "time": "2026', b"\0" * 40, b'{"kind": "st\xc3', b"7"])
def test_a_torn_line_costs_only_itself(tmp_path: Path, torn: bytes) -> None:
    with RunLog(tmp_path) as log:
        log.record("step", 1, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert [record["step"] for record in records_of(tmp_path)] == [1]
    with RunLog(tmp_path) as log:
        log.record("step", 2, loss=1.0)
    assert [record["step"] for record in records_of(tmp_path)] == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 3


def test_opening_a_whole_file_adds_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.record("step", 1, loss=1.0)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    RunLog(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert read_records(tmp_path / "absent.jsonl") == []


def test_a_view_that_fails_is_switched_off_and_the_run_goes_on(tmp_path: Path) -> None:
    good, bad = Listener(), Listener(break_at=2)
    with RunLog(tmp_path, [bad, good]) as log:
        for step in (1, 2, 3):
            log.record("step", step, loss=1.0)
    assert [record["kind"] for record in good.records] == ["step", "step", "incident", "step"]
    assert len(bad.records) == 2 and bad.closed == 0
    assert "Listener" in good.records[2]["what"] and "nobody reads" in good.records[2]["what"]
    assert records_of(tmp_path) == good.records


def test_ranks_that_are_silent_take_everything() -> None:
    log = NullLog()
    log.record("step", 1, loss=1.0)
    log.close()


def test_a_resume_supersedes_what_came_after_it(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.record("start", 0, resumed_from=None, total_steps=100)
        for step in range(1, 9):
            log.record("step", step, loss=10.0 + step)
            log.record("sample", step, prompt="p", text="first")
        for step in (0, 4, 8):
            log.record("evaluation", step, val_loss=1.0 * step)
        log.record("checkpoint", 5, name="step5", bytes=1, seconds=1.0)
        log.record("incident", 7, what="a spike")
        log.record("end", 8, reason="interrupted by SIGINT")
        log.record("start", 5, resumed_from="step5", total_steps=50)
        for step in (6, 7):
            log.record("step", step, loss=20.0 + step)
        log.record("checkpoint", 5, name="step5", bytes=2, seconds=1.0)
    history = History.of(records_of(tmp_path))
    losses = {record["step"]: record["loss"] for record in history.steps}
    assert losses == {1: 11, 2: 12, 3: 13, 4: 14, 5: 15, 6: 26, 7: 27}
    assert [record["step"] for record in history.evaluations] == [0, 4]
    assert [record["step"] for record in history.samples] == [1, 2, 3, 4, 5]
    assert [record["bytes"] for record in history.checkpoints] == [2]
    assert [record["what"] for record in history.incidents] == ["a spike"]
    assert [record["step"] for record in history.resumes] == [5]
    assert [event["kind"] for event in history.events] == ["start", "incident", "end", "start"]
    assert history.end is None, "the second session still runs"
    assert history.last_step == 7
    assert history.total_steps({"schedule": {"total_steps": 9}}) == 50


def test_the_last_named_number_of_steps_counts_and_the_best_evaluation_is_finite(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.record("start", 0, resumed_from=None, total_steps=None, hours=1.0)
        for step, loss in ((0, 9.0), (10, 3.0), (20, math.nan), (30, 4.0)):
            log.record("evaluation", step, val_loss=loss)
        log.record("schedule", 20, total_steps=777, warmup_steps=7, reason="measured")
    history = History.of(records_of(tmp_path))
    assert history.total_steps({}) == 777
    assert history.best is not None and history.best["step"] == 10
    empty = History.of([])
    assert empty.best is None and empty.end is None and empty.last_step == 0
    assert empty.total_steps({"schedule": {"total_steps": 9}}) == 9


def test_units() -> None:
    assert gib(1.5 * 2**30) == "1.50 GiB" and gib(2**20) == "1.0 MiB" and gib(math.nan) == "unknown"
    assert duration(3723.4) == "1:02:03" and duration(90061) == "1 d 1:01:01" and duration(math.inf) == "unknown"
    assert short_count(1_234_567) == "1.23M" and short_count(9_999) == "9,999" and short_count(50_257) == "50.3k"
    assert perplexity(1e9) == math.inf and perplexity(0.0) == 1.0
