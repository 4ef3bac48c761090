"""The run's record: one JSON line per event in `metrics.jsonl`, written by rank 0 and read back by every view.

A line is strict JSON in ASCII: a float that is not finite is written as the string "nan", "inf" or "-inf", and
`read_records` turns it back into a float in the fields that hold numbers. Units that all views share stand at the end.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

METRICS_FILE = "metrics.jsonl"

# Only these are read back as floats: a sample whose whole text is "nan" must stay a text.
NUMBER_FIELDS = frozenset(
    {"loss", "val_loss", "lr", "grad_norm", "loss_scale", "tokens_per_second", "mfu", "hours"}
    | {"seconds", "step_seconds", "elapsed_seconds"}
)
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

# These reach the disk at once: after a power cut the log knows of the newest checkpoint.
SYNCED_KINDS = frozenset({"start", "checkpoint", "end"})


class View(Protocol):
    """Whoever wants to see each record as it is written: the console, a tracker."""

    def show(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Recorder(Protocol):
    """What the training loop writes to: a `RunLog` on rank 0, a `NullLog` on the others."""

    def record(self, kind: str, step: int, **fields: Any) -> None: ...

    def close(self) -> None: ...


class NullLog:
    """The recorder of every rank but 0: takes everything, writes nothing."""

    def record(self, kind: str, step: int, **fields: Any) -> None:
        pass

    def close(self) -> None:
        pass


class RunLog:
    """Appends records to `folder/metrics.jsonl`, a flushed line each, and hands every record to the views.

    A view that raises (a closed pipe, a terminal that went away) is switched off and an incident is recorded: nobody
    loses a day of training to a display. Errors of the file itself (OSError) are raised: the file is the truth.
    """

    def __init__(self, folder: Path, views: Sequence[View] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        self._views = list(views)
        self._file = open(self.path, "ab+")  # noqa: SIM115
        if self._file.tell() > 0:
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")
                self._file.flush()

    def record(self, kind: str, step: int, **fields: Any) -> None:
        """Write one record; `step` counts the optimizer steps done. Numpy and torch scalars become plain numbers."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        record = {"kind": kind, "time": now, "step": int(step)} | _plain(fields)
        self._file.write(json.dumps(_strict(record), allow_nan=False).encode("ascii") + b"\n")
        self._file.flush()
        if kind in SYNCED_KINDS:
            os.fsync(self._file.fileno())
        failures = []
        for view in list(self._views):
            try:
                view.show(record)
            except Exception as error:
                self._views.remove(view)
                failures.append(f"{type(view).__name__} is switched off, it failed: {type(error).__name__}: {error}")
        for failure in failures:
            self.record("incident", step, what=failure)

    def close(self) -> None:
        """Close the views and the file; a second call does nothing."""
        views, self._views = self._views, []
        for view in views:
            try:
                view.close()
            except Exception:
                continue  # nothing more is to be shown, and the file holds everything
        self._file.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order. Torn lines (power cut, full disk) are passed over; no file, none."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # also UnicodeDecodeError
            continue
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            continue
        if not isinstance(record.get("step"), int) or not isinstance(record.get("time"), str):
            continue
        for name in NUMBER_FIELDS & record.keys():
            if isinstance(record[name], str):
                record[name] = NOT_FINITE.get(record[name], math.nan)
        records.append(record)
    return records


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """The records as they count: of steps, evaluations and samples the last record of each step, without those beyond
    the step at which a later session started or to which the run went back. Checkpoints: the last of each name.
    Everything else: all, in order."""

    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    incidents: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    events: list[dict[str, Any]]
    """Starts, returns, incidents, schedules and ends of all sessions, in the order in which they happened."""
    schedule: dict[str, Any] | None
    planned_steps: int | None
    """The last total number of steps that a start or a schedule record named."""
    memory: dict[str, Any] | None
    """The last session's predicted and measured memory; None while it runs, and without a measurement."""
    end: dict[str, Any] | None
    """How the last session ended; None while it runs, or when it was killed."""

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]]) -> "History":
        by_step: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "evaluation": {}, "sample": {}}
        events: list[dict[str, Any]] = []
        checkpoints: dict[str, dict[str, Any]] = {}
        schedule = memory = end = planned_steps = None
        for record in records:
            kind, step = record["kind"], record["step"]
            if kind in ("start", "schedule"):
                planned_steps = record.get("total_steps") or planned_steps
            if kind in by_step:
                by_step[kind][step] = record
                continue
            if kind == "start":
                memory = end = None
            if kind in ("start", "return"):
                for kept in by_step.values():
                    for superseded in [other for other in kept if other > step]:
                        del kept[superseded]
            elif kind == "end":
                end = record
            elif kind == "memory":
                memory = record
            elif kind == "schedule":
                schedule = record
            elif kind == "checkpoint":
                checkpoints[str(record.get("name"))] = record
            if kind in ("start", "return", "incident", "schedule", "end"):
                events.append(record)
        steps, evaluations, samples = ([kept[step] for step in sorted(kept)] for kept in by_step.values())
        return cls(
            steps=steps,
            evaluations=evaluations,
            samples=samples,
            checkpoints=sorted(checkpoints.values(), key=lambda record: record["step"]),
            incidents=[event for event in events if event["kind"] == "incident"],
            starts=[event for event in events if event["kind"] == "start"],
            events=events,
            schedule=schedule,
            planned_steps=planned_steps,
            memory=memory,
            end=end,
        )

    @property
    def resumes(self) -> list[dict[str, Any]]:
        """The start records of the sessions that went on from a checkpoint."""
        return [start for start in self.starts if start.get("resumed_from")]

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the lowest finite validation loss."""
        finite = [evaluation for evaluation in self.evaluations if math.isfinite(number(evaluation, "val_loss"))]
        return min(finite, key=lambda evaluation: number(evaluation, "val_loss"), default=None)

    @property
    def last_step(self) -> int:
        """Optimizer steps done, as far as the records that count say."""
        last = [records[-1]["step"] for records in (self.steps, self.evaluations, self.starts) if records]
        return max(last, default=0)

    def total_steps(self, plan: dict[str, Any]) -> int | None:
        """Steps the run was to have; None under `--hours` until the estimate is made."""
        return self.planned_steps or plan.get("schedule", {}).get("total_steps")


def number(record: dict[str, Any], name: str) -> float:
    """The field as a float; nan where it is missing, null or no number."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "item"):
        return value.item()
    return value if isinstance(value, float) else str(value)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# Units, the same in every view.


def gib(size_bytes: float) -> str:
    """1_610_612_736 -> "1.50 GiB"; small sizes in MiB so that they do not all read 0.00."""
    if not math.isfinite(size_bytes):
        return "unknown"
    return f"{size_bytes / 2**30:,.2f} GiB" if size_bytes >= 2**30 / 10 else f"{size_bytes / 2**20:,.1f} MiB"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole and math.isfinite(part / whole) else "unknown"


def duration(seconds: float) -> str:
    """3_723 -> "1:02:03", with the days in front where there are any."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hours}:{minutes:02}:{rest:02}"


def short_count(count: float) -> str:
    """1_234_567 -> "1.23M"; exact below 10,000."""
    if not math.isfinite(count):
        return "unknown"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            return f"{count / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{count:,.0f}"


def perplexity(loss: float) -> float:
    """exp(loss), the loss being the mean cross entropy in nats per token; inf where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
