"""The training log: `training_log.md` and its pictures, a pure function of the run folder.

`write_report` reads plan.json, ds_config.json and metrics.jsonl and nothing else (not the clock, not the machine), so
the log can be written again at any time, also of a run that was interrupted or still goes on.
"""

import json
import math
import shlex
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpt2ds.errors import UserError
from gpt2ds.files import write_atomically
from gpt2ds.runlog.markdown import details, fence, safe, table
from gpt2ds.runlog.memory_section import device_bytes, memory_section, peak_against_device, predicted_beside_measured
from gpt2ds.runlog.metrics import (
    METRICS_FILE,
    History,
    duration,
    gib,
    number,
    perplexity,
    read_records,
    short_count,
)
from gpt2ds.runlog.plots import write_plots

SECTIONS = (
    "model",
    "batch",
    "deepspeed",
    "optimizer",
    "schedule",
    "data",
    "evaluation",
    "checkpoints",
    "devices",
    "run",
)
FOLDED_SECTIONS = ("options",)
REWRITE_SECONDS = 60.0
STEP_ROWS, EVALUATION_ROWS, SAMPLES = 25, 100, 12
PICTURES = {
    "train_loss": "Training loss",
    "val_loss": "Validation loss and perplexity",
    "learning_rate": "Learning rate and gradient norm",
    "throughput": "Throughput",
}


class ReportView:
    """A view that writes the training log anew at a checkpoint, so that after a power cut it is as old as that."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written_at = time.monotonic()

    def show(self, record: dict[str, Any]) -> None:
        """Writes the log, unless it was written a minute ago: the pictures take a second or two."""
        if record["kind"] == "checkpoint" and time.monotonic() - self._written_at >= REWRITE_SECONDS:
            write_report(self._folder)
            self._written_at = time.monotonic()

    def close(self) -> None:
        """The program writes the last one itself."""


def write_report(folder: Path) -> Path:
    """Write the pictures and `training_log.md` into a run folder; returns the path of the latter.

    Raises UserError when the folder is not one that a training run wrote, naming what is missing.
    """
    plan, ds_config = _read_json(folder, ("plan.json", "ds_config.json"))
    if missing := [section for section in ("model", "batch") if not isinstance(plan.get(section), dict)]:
        raise UserError(
            f"{folder / 'plan.json'} is not the plan of a gpt2ds run: it has no {' and no '.join(missing)}."
        )
    plan = {name: section for name, section in plan.items() if isinstance(section, dict)}
    history = History.of(read_records(folder / METRICS_FILE))
    write_plots(history, plan, folder)
    path = folder / "training_log.md"
    parts = (
        _head(history, plan, folder.resolve().name),
        _summary(history, plan),
        _progress(history),
        _evaluations(history, plan),
        _samples(history),
        memory_section(history, plan),
        _configuration(plan, ds_config),
        _machine(history),
        _checkpoints(history),
        _events(history),
    )
    text = "\n".join(line for part in parts for line in part) + "\n"
    write_atomically(path, text.encode("utf-8", "replace"))
    return path


def resume_command(plan: dict[str, Any]) -> str:
    """What a user types to go on with the run of a plan.json, with as many ranks as it had."""
    ranks, logs = plan.get("batch", {}).get("ranks", 1), plan.get("options", {}).get("out", "logs")
    words = ["gpt2ds", "train", "--name", str(plan.get("run", {}).get("name", "RUN")), "--resume"]
    words += ["--gpus", str(ranks)] if ranks != 1 else []
    words += ["--out", str(logs)] if logs != "logs" else []
    return shlex.join(words)


def _read_json(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    if not folder.is_dir():
        raise UserError(f"There is no run folder {folder}; `ls logs` shows those that there are.")
    if absent := [name for name in (*names, METRICS_FILE) if not (folder / name).is_file()]:
        raise UserError(f"{folder} is not a complete run folder: {', '.join(absent)} is missing.")
    contents, problems = [], []
    for name in names:
        try:
            content = json.loads((folder / name).read_bytes())
        except (ValueError, RecursionError) as error:
            problems.append(f"{folder / name} is not JSON: {error}.")
            continue
        if not isinstance(content, dict):
            problems.append(f"{folder / name} holds no JSON object.")
        contents.append(content)
    if problems:
        raise UserError.from_list(problems)
    return contents


def _head(history: History, plan: dict[str, Any], folder_name: str) -> list[str]:
    name = str(plan.get("run", {}).get("name") or folder_name)
    lines = [f"# Training log: {safe(name)}", "", f"**{safe(_outcome(history, plan))}**", ""]
    if history.end is None or history.end.get("reason") != "completed":
        lines += ["To go on with it:", "", *fence(resume_command(plan), "bash"), ""]
    return lines


def _outcome(history: History, plan: dict[str, Any]) -> str:
    """One sentence: completed, interrupted, failed or running, and where."""
    total = history.total_steps(plan)
    where = f"at step {history.last_step:,}" + (f" of {total:,}" if total else "")
    if history.end is None:
        if not history.starts:
            return "Not started yet: no session has written a record."
        last = max(record["time"] for kind in (history.starts, history.steps, history.evaluations) for record in kind)
        return f"Running, or stopped without a word, {where}; the last record is of {_time(last)}."
    reason = str(history.end.get("reason", "ended"))
    return f"{reason[:1].upper()}{reason[1:]} {where}."


def _summary(history: History, plan: dict[str, Any]) -> list[str]:
    model, batch, devices = plan["model"], plan["batch"], plan.get("devices", {})
    last_evaluation, best = (history.evaluations[-1] if history.evaluations else None), history.best
    last = history.steps[-1] if history.steps else {}
    total = history.total_steps(plan)
    rates, mfu = _finite(history.steps, "tokens_per_second"), _finite(history.steps, "mfu")
    share = f" on {batch.get('ranks', '?')} ranks" if batch.get("ranks") != 1 else " on one rank"
    rows = [
        ("Model", f"{safe(str(model.get('name')))}, {number(model, 'parameters'):,.0f} parameters"),
        ("Profile", safe(str(plan.get("deepspeed", {}).get("profile", "unknown"))) + share),
        ("Device", safe(f"{devices.get('name') or devices.get('kind', 'unknown')}, {gib(device_bytes(plan))}")),
        ("Steps done", f"{history.last_step:,}" + (f" of {total:,}" if total else "")),
        ("Best validation loss", _loss(best)),
        ("Last validation loss", _loss(last_evaluation)),
        ("Last training loss", f"{number(last, 'loss'):.4f}" if last else "none yet"),
        ("Tokens trained on", f"{last.get('tokens') or 0:,}"),
        ("Training time", duration(number(last, "elapsed_seconds")) if last else "0:00:00"),
        ("Tokens per second, median", f"{statistics.median(rates):,.0f}" if rates else "unknown"),
        (
            "MFU, median",
            f"{100 * statistics.median(mfu):.1f}%" if mfu else "unknown (no peak rate known for the device)",
        ),
        ("Peak memory", peak_against_device(history, plan)),
        *predicted_beside_measured(history),
    ]
    return ["## Summary", "", *table(("", ""), rows), ""]


def _loss(evaluation: dict[str, Any] | None) -> str:
    if evaluation is None:
        return "none yet"
    loss = number(evaluation, "val_loss")
    return f"{loss:.4f} (perplexity {perplexity(loss):,.2f}) at step {evaluation['step']:,}"


def _progress(history: History) -> list[str]:
    lines = ["## Progress", ""]
    for name, title in PICTURES.items():
        lines += [f"![{title}]({name}.png)", ""]
    kept = _thinned(history.steps, STEP_ROWS)
    if not kept:
        return [*lines, "No step is recorded yet.", ""]
    if len(kept) < len(history.steps):
        lines += [f"{len(kept)} of {len(history.steps):,} recorded steps; all of them are in `{METRICS_FILE}`.", ""]
    header = (
        "step",
        "tokens",
        "loss",
        "learning rate",
        "grad norm",
        "tokens/s",
        "MFU",
        "peak memory",
        "skipped",
        "time",
    )
    rows = []
    for step in kept:
        mfu, sizes = number(step, "mfu"), step.get("memory_bytes") or []
        rows.append(
            (
                f"{step['step']:,}",
                f"{step.get('tokens') or 0:,}",
                f"{number(step, 'loss'):.4f}",
                f"{number(step, 'lr'):.3g}",
                f"{number(step, 'grad_norm'):.3f}",
                f"{number(step, 'tokens_per_second'):,.0f}",
                f"{100 * mfu:.1f}%" if math.isfinite(mfu) else "",
                gib(max(sizes)) if sizes else "",
                f"{step.get('skipped_steps') or 0:,}",
                duration(number(step, "elapsed_seconds")),
            )
        )
    return [*lines, *table(header, rows, left=0), ""]


def _evaluations(history: History, plan: dict[str, Any]) -> list[str]:
    lines = ["## Evaluation results", ""]
    if not history.evaluations:
        return [*lines, "No evaluation yet.", ""]
    best = history.best
    kept = _thinned(history.evaluations, EVALUATION_ROWS)
    if best is not None and best not in kept:
        kept = sorted([*kept, best], key=lambda record: record["step"])
    if len(kept) < len(history.evaluations):
        lines += [f"{len(kept)} of {len(history.evaluations):,}; all of them are in `{METRICS_FILE}`.", ""]
    tokens_at = {step["step"]: step.get("tokens") for step in history.steps}
    each = plan["batch"].get("tokens_per_step") or 0
    rows = []
    for record in kept:
        step, loss = record["step"], number(record, "val_loss")
        cells = [f"{step:,}", f"{tokens_at.get(step) or step * each:,}", f"{loss:.4f}", f"{perplexity(loss):,.2f}"]
        cells += [f"{record.get('windows') or 0:,}", f"{number(record, 'seconds'):.1f}"]
        rows.append([f"**{cell}**" for cell in cells] if record is best else cells)
    header = ("step", "tokens", "validation loss", "perplexity", "windows", "seconds")
    return [*lines, *table(header, rows, left=0), "", "The best is in bold.", ""]


def _samples(history: History) -> list[str]:
    lines = ["## Sample outputs", ""]
    if not history.samples:
        return [*lines, "No sample yet.", ""]
    kept = _thinned(history.samples, SAMPLES)
    if len(kept) < len(history.samples):
        lines += [f"{len(kept)} of {len(history.samples):,}; all of them are in `{METRICS_FILE}`.", ""]
    for record in reversed(kept):
        prompt, text = str(record.get("prompt", "")), str(record.get("text", ""))
        quoted = fence(text.removeprefix(prompt), "text")
        lines += [f"Step {record['step']:,}: **{safe(prompt.strip()) or '(no prompt)'}**", "", *quoted, ""]
    return lines


def _configuration(plan: dict[str, Any], ds_config: dict[str, Any]) -> list[str]:
    lines = ["## Configuration", ""]
    for section in SECTIONS:
        if plan.get(section):
            lines += [f"### {section}", "", *_section_table(plan[section]), ""]
    for section in FOLDED_SECTIONS:
        if plan.get(section):
            lines += [*details(f"{section}, as they were given", _section_table(plan[section])), ""]
    text = json.dumps(ds_config, indent=2)
    return [*lines, *details("The DeepSpeed configuration, <code>ds_config.json</code>", fence(text, "json")), ""]


def _section_table(section: dict[str, Any]) -> list[str]:
    return table(("setting", "value"), [(f"`{name}`", _value(name, value)) for name, value in section.items()])


def _value(name: str, value: Any) -> str:
    """A setting with its unit, which its name tells."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_value(name, item) for item in value)
    if not isinstance(value, int | float):
        return safe(str(value)) if not isinstance(value, dict) else safe(json.dumps(value))
    if name.endswith("_bytes"):
        return f"{gib(value)} ({value:,} bytes)"
    if name == "peak_flops":
        return f"{value / 1e12:,.4g} TFLOP/s"
    if name == "seed" or isinstance(value, float):
        return f"{value}"
    if name == "parameters":
        return f"{value:,} ({short_count(value)})"
    units = {"tokens": "tokens", "steps": "steps", "seconds": "s", "minutes": "minutes", "hours": "hours"}
    unit = units.get(name.rpartition("_")[2]) or {"context": "tokens", "context_length": "tokens"}.get(name)
    return f"{value:,} {unit}" if unit else f"{value:,}"


def _machine(history: History) -> list[str]:
    if not history.starts:
        return []
    start = history.starts[-1]
    hardware, versions = start.get("hardware") or {}, start.get("versions") or {}
    gpus = hardware.get("gpus") or []
    rows = [
        (f"GPU {index}", f"{safe(str(gpu.get('name')))}, {gib(number(gpu, 'total_bytes'))}")
        for index, gpu in enumerate(gpus)
    ]
    rows += [
        ("CPU", f"{safe(str(hardware.get('cpu_name', 'unknown')))}, {hardware.get('host_cores', '?')} cores"),
        ("Host memory", gib(number(hardware, "host_memory_bytes"))),
    ]
    versions_rows = [(safe(str(name)), safe(str(version))) for name, version in versions.items()]
    lines = ["## Hardware", "", *table(("", ""), rows), "", "## Versions", "", *table(("", ""), versions_rows), ""]
    if notes := [note for start in history.starts[:1] for note in start.get("notes") or []]:
        lines += ["## Chosen by default", "", *(f"- {safe(str(note))}" for note in notes), ""]
    commands = list(dict.fromkeys(str(start.get("command", "")) for start in history.starts))
    return [*lines, "## Command", "", *fence("\n".join(commands), "bash"), ""]


def _checkpoints(history: History) -> list[str]:
    lines = ["## Checkpoints", ""]
    if not history.checkpoints:
        return [*lines, "None yet.", ""]
    rows = [
        (
            safe(str(record.get("name"))),
            f"{record['step']:,}",
            gib(number(record, "bytes")),
            f"{number(record, 'seconds'):.1f}",
        )
        for record in history.checkpoints
    ]
    about = "All that were written; the older ones may have been removed since."
    return [*lines, about, "", *table(("name", "step", "size", "seconds to write"), rows, left=1), ""]


def _events(history: History) -> list[str]:
    """Every start, resume, return, incident, schedule and end, in the order in which they happened."""
    rows = []
    for record in history.events:
        if record["kind"] == "start":
            text = f"resumed from {record['resumed_from']}" if record.get("resumed_from") else "started"
        elif record["kind"] == "return":
            text = f"went back to {record.get('resumed_from')} from step {record.get('from_step')}"
        elif record["kind"] == "schedule":
            text = f"schedule of {record.get('total_steps') or 0:,} steps: {record.get('reason')}"
        elif record["kind"] == "incident":
            text = f"incident: {record.get('what')}"
        else:
            text = f"ended: {record.get('reason')}"
        rows.append((_time(record["time"]), f"{record['step']:,}", safe(text)))
    return ["## Sessions and incidents", "", *table(("time (UTC)", "step", "what happened"), rows)]


def _finite(records: Iterable[dict[str, Any]], name: str) -> list[float]:
    return [value for record in records if math.isfinite(value := number(record, name))]


def _thinned(records: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` records, evenly spread, with the first and the last."""
    if len(records) <= most:
        return list(records)
    return [records[round(index * (len(records) - 1) / (most - 1))] for index in range(most)]


def _time(text: str) -> str:
    return text.replace("T", " ").removesuffix("Z")
