"""What a bench is read by on a terminal: a line for each setting while it goes on, and the table at the end."""

import statistics
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from gpt2ds.runlog.metrics import gib, short_count


def summary(record: dict[str, Any]) -> str:
    """One setting and what came of it, on a line."""
    if record["result"] != "measured":
        return f"{_full_name(record)}: {failure(record)}"
    return f"{_full_name(record)}: {record['tokens_per_second']:,.0f} tokens/s, {gib(max(record['peak_bytes']))}"


def failure(record: dict[str, Any]) -> str:
    """How a setting failed, whether that was predicted, and where its log is."""
    sentence = " ".join(line.removeprefix("  - ") for line in str(record["why"]).splitlines())
    text = f"{record['result']}: {sentence}"
    predicted = record.get("predicted")
    if predicted and record["result"] == "out of memory":
        expected = "as predicted" if not predicted["fits"] else "although it was predicted to fit"
        text += f"; {expected} (peak {gib(predicted['peak_bytes'])})"
    return text + (f" [{record['log']}]" if record.get("log") else "")


def by_speed(bench: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings, the fastest first and the failed ones last."""
    return sorted(bench["settings"], key=lambda record: -record.get("tokens_per_second", 0.0))


def report(bench: dict[str, Any]) -> Group:
    """Everything for the terminal: the table, the failures' reasons, and what the figures mean."""
    cuda = bench["device"]["kind"] == "cuda"
    parts: list[Any] = [Text(title(bench), style="bold"), _table(bench, cuda)]
    if bench.get("largest"):
        parts += [Text("Largest micro-batch, by real runs", style="bold"), _largest_table(bench)]
    failures: dict[str, list[str]] = {}
    for record in bench["settings"]:
        if record["result"] != "measured":
            failures.setdefault(failure(record), []).append(_full_name(record))
    parts += [Text(f"{'; '.join(names)}: {text}") for text, names in failures.items()]
    parts.append(Text(_meaning(bench, cuda), style="dim" if cuda else "bold"))
    return Group(*parts)


def _table(bench: dict[str, Any], cuda: bool) -> Table:
    mfu = any(record.get("mfu") is not None for record in bench["settings"])
    table = Table()
    for column, justify in (
        ("profile", "left"),
        ("micro-batch", "right"),
        ("recompute", "left"),
        ("tokens/s", "right"),
    ):
        table.add_column(column, justify=justify, no_wrap=column == "profile")  # type: ignore[arg-type]
    for column in (
        *(["MFU"] if mfu else []),
        "s/step",
        *(["allocated", "reserved", "predicted", "difference"] if cuda else ["resident memory"]),
    ):
        table.add_column(column, justify="right")
    for record in by_speed(bench):
        measured = record["result"] == "measured"
        cells = [record["profile"], str(record["micro_batch"] or "-"), record["recompute"] or "-"]
        cells.append(f"{record['tokens_per_second']:,.0f}" if measured else f"[red]{record['result']}[/red]")
        if mfu:
            cells.append(f"{record['mfu']:.1%}" if record.get("mfu") is not None else "")
        cells.append(f"{median(record):.3g}" if measured else "")
        cells.append(gib(max(record["peak_bytes"])) if measured else "")
        if cuda:
            predicted = record.get("predicted") or {}
            cells += [
                gib(max(record["reserved_bytes"])) if measured else "",
                gib(predicted["peak_bytes"]) if predicted else "",
                f"{predicted['difference_percent']:+.1f}%" if "difference_percent" in predicted else "",
            ]
        table.add_row(*cells)
    return table


def _largest_table(bench: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("profile", no_wrap=True)
    table.add_column("recompute")
    for column in ("predicted", "runs", "does not run"):
        table.add_column(column, justify="right")
    for found in bench["largest"]:
        fails = str(found["fails"]) if found["fails"] else f"unknown: {found['how']}"
        table.add_row(found["profile"], found["recompute"], str(found["predicted"]), str(found["runs"]), fails)
    return table


def title(bench: dict[str, Any]) -> str:
    """What all settings of a bench share."""
    device, model = bench["device"], bench["model"]
    cards = f"{bench['ranks']} x {device['name']}" if device["kind"] == "cuda" else f"{device['name']} (CPU, not a GPU)"
    cap = f" as a card of {device['gpu_memory_gb']:g} GB" if device["gpu_memory_gb"] else ""
    ranks = f", {bench['ranks']} ranks" if device["kind"] == "cpu" and bench["ranks"] > 1 else ""
    return (
        f"{model['name']} ({short_count(model['parameters'])} parameters), context {bench['context']}, accumulation "
        f"{bench['accumulation']}, on {cards}{cap}{ranks}"
    )


def _meaning(bench: dict[str, Any], cuda: bool) -> str:
    speed = f"tokens/s of all ranks: the median of {bench['steps']} steps after {bench['warm_up_steps']} left out"
    if not cuda:
        return (
            f"Measured on a CPU, which is not a GPU: {speed}; resident memory is the most that a rank's process ever "
            "had, the libraries included. It is not comparable with GPU memory, and nothing is predicted for it."
        )
    return (
        f"{speed}. allocated, reserved: peak of torch's allocator on the fullest rank. predicted: peak allocated "
        "by the formula; difference: predicted above (+) or below (-) measured, in % of measured. The limit for "
        f"reserved memory is {gib(bench['device']['usable_bytes'])}."
    )


def median(record: dict[str, Any]) -> float:
    """Seconds of the median step."""
    return float(statistics.median(record["step_seconds"]))


def _full_name(record: dict[str, Any]) -> str:
    recompute = f", recompute {record['recompute']}" if record["recompute"] else ""
    return f"{record['profile']}, micro-batch {record['micro_batch'] or '?'}{recompute}"


def short_name(record: dict[str, Any]) -> str:
    """Profile, micro-batch and, where there is any, recompute: what tells the settings of a bench apart."""
    recompute = f", {record['recompute']}" if record["recompute"] not in (None, "none") else ""
    return f"{record['profile']}, {record['micro_batch'] or '?'}{recompute}"


def show(bench: dict[str, Any], folder: Path) -> None:
    """Prints the report and writes bench.png beside bench.json."""
    from gpt2ds.probe.bench_plot import write_plot

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, 120))
    console.print(report(bench))
    console.print(f"{folder / 'bench.json'}, {write_plot(bench, folder)}", markup=False, soft_wrap=True)
