"""The console as its reader gets it: the characters that arrive on a terminal, in a pipe, in an old encoding."""

import io
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gpt2ds.runlog import console
from gpt2ds.runlog.console import console_view, curve

PLAN: dict[str, Any] = {
    "run": {"name": "novels"},
    "model": {"name": "gpt2_tiny", "parameters": 3_200_000},
    "batch": {"ranks": 2},
    "deepspeed": {"profile": "zero2"},
    "schedule": {"total_steps": 1000, "hours": None},
    "devices": {"kind": "cuda", "name": "NVIDIA RTX 4090", "memory_bytes": 24 * 2**30},
}
HOSTILE = "[bold red]ripe[/] [/nonsense] \x1b[31m \r\n ``` \u2028 sœur \ud800 :smile:"


def step_record(step: int, **changed: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": step,
        "loss": 4 + 6 / step,
        "lr": 3e-4,
        "grad_norm": 0.75,
        "tokens": step * 4096,
        "tokens_per_second": 2048.0,
        "step_seconds": 2.0,
        "elapsed_seconds": 2.0 * step,
        "mfu": 0.412,
        "memory_bytes": [6 * 2**30, 12 * 2**30],
        "reserved_bytes": None,
        "skipped_steps": 0,
        "loss_scale": None,
    } | changed


def a_run(steps: int) -> list[dict[str, Any]]:
    start = {
        "kind": "start",
        "step": 0,
        "resumed_from": None,
        "total_steps": 1000,
        "notes": ["tiny model, no GPU", "x"],
    }
    return [
        start,
        {"kind": "evaluation", "step": 0, "val_loss": 10.5, "windows": 8, "seconds": 1.5},
        {"kind": "sample", "step": 0, "prompt": "Fruits are", "text": HOSTILE},
        *(step_record(step) for step in range(1, steps + 1)),
        {"kind": "checkpoint", "step": steps, "name": "step9", "bytes": 2**30, "seconds": 3.0},
        {"kind": "incident", "step": steps, "what": "Step 9 was left out: [b]inf[/b]."},
        {"kind": "end", "step": steps, "reason": "completed", "tokens": 1, "elapsed_seconds": 2.0 * steps},
    ]


def shown(records: list[dict[str, Any]], terminal: bool, encoding: str = "utf-8", plan: dict[str, Any] = PLAN) -> str:
    """What arrives, strictly encoded; the colour and cursor codes of the console itself are taken out."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="")
    view = console_view(plan, terminal=terminal, stream=stream)
    for record in records:
        view.show(record)
    view.close()
    stream.flush()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw.getvalue().decode(encoding))


def test_plain_lines_say_everything_in_a_fixed_order_with_units() -> None:
    lines = shown(a_run(40), terminal=False).splitlines()
    assert lines[0] == "Tiny model, no GPU. X."
    assert lines[1] == "novels | gpt2_tiny (3.2M parameters) | zero2 | 2 x NVIDIA RTX 4090"
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 11, "the first ten and the last"
    assert steps[0] == (
        "step 1/1,000 | loss 10.0000 | lr 3.00e-04 | grad norm 0.750 | 2,048 tokens/s | MFU 41.2% | "
        "memory 6.00 + 12.00 GiB of 24.00 GiB (50.0%) | 0:00:02 elapsed, 0:33:18 left"
    )
    assert steps[-1].startswith("step 40/1,000") and steps[-1].endswith("0:01:20 elapsed, 0:32:00 left")
    assert "validation loss 10.5000 | perplexity 36,315.5 | at step 0 | best 10.5000 at step 0 | 1.5 s" in lines
    assert "checkpoint step9 at step 40 | 1.00 GiB | 3.0 s" in lines
    assert "incident at step 40: Step 9 was left out: [b]inf[/b]." in lines
    assert lines[-1] == "completed at step 40 | 0:01:20"
    assert lines.index(steps[-1]) == lines.index("checkpoint step9 at step 40 | 1.00 GiB | 3.0 s") - 1


def test_plain_steps_go_on_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PLAIN_EVERY_SECONDS", 0.0)
    assert sum(line.startswith("step ") for line in shown(a_run(40), terminal=False).splitlines()) == 40


def test_a_hostile_sample_is_one_harmless_line() -> None:
    (line,) = [line for line in shown(a_run(1), terminal=False).split("\n") if line.startswith("sample")]
    assert line == "sample: Fruits are[bold red]ripe[/] [/nonsense] [31m ``` sœur :smile:"
    panel = shown(a_run(1), terminal=True)
    assert "[bold red]ripe[/] [/nonsense]" in panel and ":smile:" in panel


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_an_encoding_without_the_characters_is_no_reason_to_fail(terminal: bool, encoding: str) -> None:
    text = shown(a_run(20), terminal=terminal, encoding=encoding)
    assert ("s?ur" if encoding != "cp1252" else "sœur") in text
    assert "loss" in text and "GiB" in text


@pytest.mark.parametrize("columns", [1, 20, 59, 60, 100, 250])
def test_the_panel_keeps_within_any_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "20")
    text = shown(a_run(300), terminal=True)
    assert max(len(line) for line in re.split(r"[\r\n]+", text)) <= columns
    if columns >= 100:
        for piece in ("novels", "step 300/1,000", "30.0%", "0:10:00 elapsed, 0:23:20 left", "loss", "4.0200", "█"):
            assert piece in text
        for piece in ("3.00e-04", "2,048 tokens/s", "MFU 41.2%", "6.00 + 12.00 GiB of 24.00 GiB (50.0%)", "completed"):
            assert piece in text
        for piece in ("loss 10.5000", "perplexity", "ripe", "Step 9 was left out: [b]inf[/b]."):
            assert piece in text


def test_drawing_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    began = time.monotonic()
    text = shown([step_record(step) for step in range(1, 3001)], terminal=True)
    # The first drawing, the last, and the one that leaves the panel standing.
    assert text.count("╭") <= 3 + (time.monotonic() - began) / console.DRAW_EVERY_SECONDS


def test_under_hours_progress_and_time_left_go_by_the_clock() -> None:
    plan = PLAN | {"schedule": {"total_steps": None, "hours": 2.0}}
    records = [step_record(step, mfu=None, memory_bytes=None) for step in (1, 900)]
    text = shown(records, terminal=False, plan=plan)
    assert "step 900 | loss" in text and "0:30:00 elapsed, 1:30:00 left" in text
    assert "MFU" not in text and "memory unknown" in text
    assert "25.0%" in shown(records, terminal=True, plan=plan)


def test_ranks_on_a_cpu_share_the_host_and_many_ranks_become_a_range() -> None:
    host = PLAN | {"devices": {"kind": "cpu", "name": "EPYC", "memory_bytes": 36 * 2**30}}
    assert "memory 6.00 + 12.00 GiB of the host's 36.00 GiB (50.0% together)" in shown(a_run(1), False, plan=host)
    many = step_record(1, memory_bytes=[(5 + rank) * 2**30 for rank in range(16)])
    assert "memory 5.00 to 20.00 GiB (most: rank 15) of 24.00 GiB (83.3%)" in shown([many], terminal=False)


@pytest.mark.parametrize("terminal", [True, False])
def test_records_that_hold_nothing_are_shown_too(terminal: bool) -> None:
    kinds = ["start", "schedule", "step", "evaluation", "sample", "checkpoint", "incident", "end"]
    bare = [{"kind": kind, "step": 1} for kind in kinds]
    assert shown(bare, terminal=terminal, plan={})
    assert "nan" in shown([step_record(1, loss=math.nan)], terminal=False)


def test_the_curve() -> None:
    assert curve([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert curve([8, 8, 1, 1], 2) == "█▁" and curve([], 5) == "" and curve([3.0], 5) == "▁"
    assert curve([math.nan, 1.0, math.inf, 2.0], 4) == "x▁x█"
    assert curve([2.0, 1.0], 9, ascii_only=True).isascii()


def test_standard_output_is_copied_before_anyone_turns_it_away(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from gpt2ds.runlog.console import console_view\n"
        "view = console_view({})\n"
        "os.dup2(os.open(os.devnull, os.O_WRONLY), 1)\n"
        "print('chatter')\n"
        "view.show({'kind': 'sample', 'step': 1, 'prompt': '', 'text': 'sœur'})\n"
        "view.close()\n"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, check=True, timeout=60)
    assert done.stdout == b"sample: s?ur\n" and done.stderr == b""
