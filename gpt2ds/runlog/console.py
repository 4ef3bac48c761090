"""What a person sees while the run goes: a live panel on a terminal, plain lines in a fixed order elsewhere.

A view of the records, nothing more: it never raises because of a narrow terminal, an encoding without the characters
or a sample that looks like markup, and it draws seldom enough that the training loop cannot feel it.
"""

import contextlib
import io
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import IO, Any, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gpt2ds.runlog.memory_check import MemoryCheck
from gpt2ds.runlog.metrics import View, duration, gib, number, percent, perplexity, short_count

PLAIN_FIRST_STEPS = 10
PLAIN_EVERY_SECONDS = 5.0
DRAW_EVERY_SECONDS = 0.5
DRAW_SHARE = 1 / 300  # of the run's time, at most: after a drawing that took 5 ms the next one waits 1.5 s
CURVE_STEPS = 1000
RANKS_LISTED = 8
INCIDENTS_SHOWN = 3
STACKED_BELOW_COLUMNS = 60


def console_view(plan: dict[str, Any], *, terminal: bool | None = None, stream: TextIO | None = None) -> View:
    """The view for `RunLog`. `terminal`: None asks the stream. `stream`: by default a private copy of standard output,
    made now, so that it still reaches the user when the file descriptor is later turned to `deepspeed.log`."""
    output = _Output(stream)
    if terminal is None:
        terminal = output.isatty() and os.environ.get("TERM") != "dumb"
    return LiveView(plan, output) if terminal else PlainView(plan, output)


class _Output(io.TextIOBase):
    """A text stream on which every character can be written: those that the encoding lacks become "?"."""

    def __init__(self, stream: TextIO | None) -> None:
        self._own: TextIO | None = None
        self._stream: TextIO = stream or sys.stdout
        if stream is None:
            # Where no file is behind it, as under a test runner, the object itself has to do.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                copy = os.dup(self._stream.fileno())
                self._stream = self._own = open(copy, "w", encoding=self.encoding, errors="replace")  # noqa: SIM115

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding, "replace"))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        if self._own is not None:
            self._own.close()


class _State:
    """The latest of everything, as the records told it, and the texts that both views make of it."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.start: dict[str, Any] = {}
        self.step: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        self.sample: dict[str, Any] = {}
        self.incidents: list[dict[str, Any]] = []
        self.memory_check: MemoryCheck | None = None
        self.end: dict[str, Any] = {}
        self.losses: deque[float] = deque(maxlen=CURVE_STEPS)
        self._recent: deque[tuple[int, float]] = deque(maxlen=100)
        self.total_steps: int | None = plan.get("schedule", {}).get("total_steps")
        self.hours: float | None = plan.get("schedule", {}).get("hours")

    def take(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind in ("start", "schedule"):
            self.total_steps = record.get("total_steps") or self.total_steps
        if kind == "start":
            self.start, self.hours = record, record.get("hours") or self.hours
            self.best, self.end = {}, {}
        elif kind == "step":
            self.step = record
            self.losses.append(number(record, "loss"))
            self._recent.append((record["step"], number(record, "elapsed_seconds")))
        elif kind == "evaluation":
            self.evaluation = record
            if not number(self.best, "val_loss") <= number(record, "val_loss"):
                self.best = record
        elif kind == "sample":
            self.sample = record
        elif kind == "incident":
            self.incidents.append(record)
        elif kind == "memory":
            self.memory_check = MemoryCheck.of(record)
        elif kind == "end":
            self.end = record

    def fraction(self) -> float:
        """How much of the run is done, from 0 to 1: by the clock under --hours, else by steps; 0 where nobody knows."""
        done = 0.0
        if self.hours:
            done = number(self.step, "elapsed_seconds") / (3600 * self.hours) if self.step else 0.0
        elif self.total_steps:
            done = self.step_number() / self.total_steps
        return min(1.0, max(0.0, done)) if math.isfinite(done) else 0.0

    def step_number(self) -> int:
        return int(self.step.get("step", self.start.get("step", 0)))

    def seconds_left(self) -> float:
        """From the pace of the last 100 steps; nan before there is one."""
        elapsed = number(self.step, "elapsed_seconds")
        if self.hours:
            return max(0.0, 3600 * self.hours - elapsed)
        if not self.total_steps or not self._recent:
            return math.nan
        (first, began), (last, now) = self._recent[0], self._recent[-1]
        pace = (now - began) / (last - first) if last > first else number(self.step, "step_seconds")
        return max(0, self.total_steps - last) * pace

    def name(self) -> str:
        model, devices, batch = (self.plan.get(section, {}) for section in ("model", "devices", "batch"))
        parts = [
            str(self.plan.get("run", {}).get("name", "run")),
            f"{model.get('name', 'model')} ({short_count(number(model, 'parameters'))} parameters)",
            str(self.plan.get("deepspeed", {}).get("profile", "no profile")),
            f"{batch.get('ranks', '?')} x {devices.get('name') or devices.get('kind', 'device')}",
        ]
        return " | ".join(parts)

    def progress(self) -> str:
        total = f"/{self.total_steps:,}" if self.total_steps else ""
        return f"step {self.step_number():,}{total}"

    def times(self) -> str:
        left = self.seconds_left()
        return f"{duration(number(self.step, 'elapsed_seconds'))} elapsed" + (
            f", {duration(left)} left" if math.isfinite(left) else ""
        )

    def speed(self) -> str:
        mfu = number(self.step, "mfu")
        rate = number(self.step, "tokens_per_second")
        return (f"{rate:,.0f} tokens/s" if math.isfinite(rate) else "unknown tokens/s") + (
            f" | MFU {100 * mfu:.1f}%" if math.isfinite(mfu) else ""
        )

    def memory(self) -> str:
        """Every rank's memory against the device: a card each on CUDA, the host's memory for all of them on a CPU."""
        used = [float(size) for size in self.step.get("memory_bytes") or []]
        if not used:
            return "unknown"
        devices = self.plan.get("devices", {})
        size = number(devices, "memory_bytes")
        if len(used) > RANKS_LISTED:
            ranks = f"{min(used) / 2**30:,.2f} to {gib(max(used))} (most: rank {used.index(max(used))})"
        else:
            ranks = " + ".join(gib(rank).removesuffix(" GiB") for rank in used)
            ranks += "" if ranks.endswith("MiB") else " GiB"
        if not size > 0:
            return ranks
        if devices.get("kind") == "cuda":
            return f"{ranks} of {gib(size)} ({percent(max(used), size)})"
        return f"{ranks} of the host's {gib(size)} ({percent(sum(used), size)}{' together' if len(used) > 1 else ''})"

    def validation(self) -> str:
        loss, best = number(self.evaluation, "val_loss"), number(self.best, "val_loss")
        text = f"loss {loss:.4f} | perplexity {perplexity(loss):,.1f} | at step {self.evaluation['step']:,}"
        since = " since the resume" if self.start.get("resumed_from") else ""  # earlier sessions are not shown again
        return text + f" | best{since} {best:.4f} at step {self.best['step']:,}"

    def notes(self) -> str:
        """What was chosen for the user, as sentences on one line."""
        notes = [str(note).rstrip(".") for note in self.start.get("notes") or []]
        return " ".join(f"{note[:1].upper()}{note[1:]}." for note in notes) or "Everything was asked for."

    def optimizer(self) -> str:
        text = f"lr {number(self.step, 'lr'):.2e} | grad norm {number(self.step, 'grad_norm'):.3f}"
        if math.isfinite(number(self.step, "loss_scale")):
            text += f" | loss scale {number(self.step, 'loss_scale'):g}"
        if self.step.get("skipped_steps"):
            text += f" | {self.step['skipped_steps']:,} skipped"
        return text


def one_line(text: str, length: int) -> str:
    """Without line breaks or control characters, cut to `length` with "..." at the end."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= length else line[: max(0, length - 3)] + "..."


def sample_text(record: dict[str, Any]) -> str:
    """Prompt and continuation in one, whether or not the text begins with its prompt."""
    prompt, text = str(record.get("prompt", "")), str(record.get("text", ""))
    return text if text.startswith(prompt) else prompt + text


class PlainView:
    """A line per event; of the steps the first ten, then one every few seconds, and the last."""

    def __init__(self, plan: dict[str, Any], output: _Output) -> None:
        self._state = _State(plan)
        self._output = output
        self._shown_steps = 0
        self._shown_at = -math.inf
        self._pending = False

    def show(self, record: dict[str, Any]) -> None:
        state, kind = self._state, record["kind"]
        if kind in ("evaluation", "checkpoint", "memory", "end"):
            self._last_step()  # what they are about
        state.take(record)
        if kind == "start":
            self._line(state.notes())
            self._line(state.name())
            if record.get("resumed_from"):
                self._line(f"resumed from {record['resumed_from']} at step {record['step']:,}")
        elif kind == "step":
            self._pending = True
            if self._shown_steps < PLAIN_FIRST_STEPS or time.monotonic() - self._shown_at >= PLAIN_EVERY_SECONDS:
                self._step()
        elif kind == "evaluation":
            self._line(f"validation {state.validation()} | {number(record, 'seconds'):.1f} s")
        elif kind == "sample":
            self._line(f"sample: {one_line(sample_text(record), 400)}")
        elif kind == "checkpoint":
            size, seconds = gib(number(record, "bytes")), number(record, "seconds")
            self._line(f"checkpoint {record.get('name')} at step {record['step']:,} | {size} | {seconds:.1f} s")
        elif kind == "incident":
            self._line(f"incident at step {record['step']:,}: {record.get('what')}")
        elif kind == "memory" and state.memory_check:
            self._line(f"memory in the steps: {state.memory_check.line()}")
        elif kind == "schedule":
            self._line(f"schedule: {record.get('total_steps') or 0:,} steps, {record.get('reason')}")
        elif kind == "end":
            self._line(
                f"{record.get('reason')} at step {record['step']:,} | {duration(number(record, 'elapsed_seconds'))}"
            )

    def close(self) -> None:
        self._last_step()
        self._output.close()

    def _last_step(self) -> None:
        if self._pending:
            self._step()

    def _step(self) -> None:
        state = self._state
        loss, memory = f"loss {number(state.step, 'loss'):.4f}", f"memory {state.memory()}"
        self._line(" | ".join((state.progress(), loss, state.optimizer(), state.speed(), memory, state.times())))
        self._shown_steps += 1
        self._shown_at = time.monotonic()
        self._pending = False

    def _line(self, text: str) -> None:
        self._output.write(one_line(text, 2000) + "\n")
        self._output.flush()


class LiveView:
    """One panel, drawn again at a modest rate; nothing is drawn by a thread of its own."""

    def __init__(self, plan: dict[str, Any], output: _Output) -> None:
        self._state = _State(plan)
        self._output = output
        self._ascii = not output.encoding.lower().startswith("utf")
        self._console = Console(
            file=cast(IO[str], output), force_terminal=True, markup=False, highlight=False, emoji=False
        )
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._next_drawing = 0.0

    def show(self, record: dict[str, Any]) -> None:
        self._state.take(record)
        if record["kind"] == "start":
            self._console.print(Text(one_line(self._state.notes(), 2000)))
        if not self._live.is_started:
            self._live.start()
        if record["kind"] != "step" or time.monotonic() >= self._next_drawing:
            self._draw()

    def close(self) -> None:
        if self._live.is_started:
            self._draw()
            self._live.stop()
        self._output.close()

    def _draw(self) -> None:
        began = time.monotonic()
        self._live.update(self._panel(), refresh=True)
        now = time.monotonic()
        self._next_drawing = now + max(DRAW_EVERY_SECONDS, (now - began) / DRAW_SHARE)

    def _panel(self) -> RenderableType:
        state, width = self._state, self._console.width
        rows: list[tuple[str, RenderableType]] = []
        if state.step:
            recent = curve(state.losses, min(60, max(1, width - 40)), self._ascii)
            rows.append(("loss", Text.assemble((f"{number(state.step, 'loss'):.4f}", "bold"), "  ", (recent, "cyan"))))
            rows.append(("optimizer", Text(state.optimizer())))
            rows.append(("speed", Text(state.speed(), "green")))
            rows.append(("memory", Text(state.memory())))
        if state.evaluation:
            rows.append(("validation", Text(state.validation())))
        if state.sample:
            rows.append(("sample", Text(one_line(sample_text(state.sample), max(60, 2 * (width - 20))), "italic")))
        if state.memory_check:
            rows.append(("in steps", Text(state.memory_check.line())))
        for incident in state.incidents[-INCIDENTS_SHOWN:]:
            text = one_line(f"at step {incident['step']:,}: {incident.get('what')}", 300)
            rows.append(("incident", Text(text, "red")))
        if state.end:
            rows.append(("ended", Text(one_line(str(state.end.get("reason")), 300), "bold")))
        body: list[RenderableType] = [
            self._progress(),
            _labelled(rows) if width >= STACKED_BELOW_COLUMNS else _stacked(rows),
        ]
        title, subtitle = state.name().split(" | ", 1)
        if width >= STACKED_BELOW_COLUMNS:
            return Panel(Group(*body), title=Text(title, "bold"), title_align="left", subtitle=Text(subtitle, "dim"))
        return Panel(Group(*body), title=Text(title, "bold"), title_align="left", padding=0)

    def _progress(self) -> RenderableType:
        state = self._state
        done = state.fraction()
        bar = ProgressBar(total=1.0, completed=done, complete_style="green", finished_style="green")
        percentage = Text(f"{100 * done:.1f}%")
        if self._console.width < STACKED_BELOW_COLUMNS:
            return Group(Text(state.progress()), bar, percentage, Text(state.times()))
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True)
        line.add_row(Text(state.progress(), "bold"), bar, percentage, Text(state.times(), "dim"))
        return line


def _labelled(rows: list[tuple[str, RenderableType]]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for label, content in rows:
        table.add_row(label, content)
    return table


def _stacked(rows: list[tuple[str, RenderableType]]) -> RenderableType:
    return Group(*(part for label, content in rows for part in (Text(label, "dim"), content)))


def curve(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """The values as a line of at most `width` blocks, each the median of its share; not finite ones show as "x"."""
    marks = "_.-~=*^#" if ascii_only else "▁▂▃▄▅▆▇█"
    values = list(values)
    columns = min(max(1, width), len(values))
    medians: list[float | None] = []
    for column in range(columns):
        share = values[column * len(values) // columns : (column + 1) * len(values) // columns]
        finite = [value for value in share if math.isfinite(value)]
        medians.append(statistics.median(finite) if finite else None)
    known = [median for median in medians if median is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(marks) - 1) / (high - low) if high > low else 0.0
    return "".join("x" if median is None else marks[round((median - low) * scale)] for median in medians)
