"""Another torch or deepspeed than the pinned ones: what moved in the trace is named, and is no failure."""

import json
import re
from pathlib import Path

import pytest
from probe.canary import RECORD, installed, judge, moved, traced_peaks

PINS = Path(__file__).parents[2] / "constraints.txt"
RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))


def test_the_trace_is_what_it_was() -> None:
    try:
        lines = moved(RECORDED["peaks"], traced_peaks())
    except RuntimeError as error:  # a stand-in that another version has no use for, or misses
        lines = [str(error)]
    judge(RECORDED, installed(), lines)


def test_the_record_belongs_to_the_pinned_versions() -> None:
    pins = dict(re.findall(r"^(torch|deepspeed)==(\S+)$", PINS.read_text(encoding="utf-8"), re.MULTILINE))
    assert RECORDED["versions"] == pins, "python tests/probe/canary.py records the new versions"


BEFORE = {"ZeRO-1": {"forward": 1000, "backward": 2000, "step": 500}, "ZeRO-2": {"forward": 900}}
NOW = {"ZeRO-1": {"forward": 1000, "backward": 2500, "reduction": 10}, "ZeRO-2": {"forward": 900}}
MOVED = [
    "ZeRO-1, backward: held 2,000 bytes, now 2,500 (+25.00%)",
    "ZeRO-1, step: held 500 bytes, is no longer there",
    "ZeRO-1, reduction: was not there, holds 10 bytes",
]
PINNED = {"torch": "2.13.0", "deepspeed": "0.19.8"}


def test_every_phase_that_moved_is_named() -> None:
    assert moved(BEFORE, NOW) == MOVED
    assert moved(BEFORE, BEFORE) == []


def test_with_the_pinned_versions_a_difference_fails() -> None:
    with pytest.raises(AssertionError, match="ZeRO-1, backward: held 2,000 bytes, now 2,500"):
        judge({"versions": PINNED}, PINNED, MOVED)
    judge({"versions": PINNED}, PINNED, [])


def test_with_other_versions_a_difference_is_a_report(recwarn: pytest.WarningsRecorder) -> None:
    newer = PINNED | {"deepspeed": "0.20.1"}
    judge({"versions": PINNED}, newer, [])
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match=r"deepspeed 0.20.1 \(recorded with 0.19.8\).*\n.*backward: held 2,000"
    ) as seen:
        judge({"versions": PINNED}, newer, MOVED)
    assert all(line in str(seen[0].message) for line in MOVED)
    assert "torch" not in str(seen[0].message)
