"""The training log's section on memory: predicted beside measured, rank by rank, and what the prediction is made of."""

import math
from itertools import zip_longest
from typing import Any

from gpt2ds.runlog.markdown import safe, table
from gpt2ds.runlog.memory_check import MemoryCheck
from gpt2ds.runlog.metrics import History, gib, number, percent

ABOUT_CUDA = "Peaks of what CUDA's caching allocator allocated and reserved."
ABOUT_RESIDENT = "Resident memory of each process, so with Python and its libraries; the ranks share the host's memory."
ABOUT_TENSORS = (
    "Tensors: live bytes of all tensors at the peak of the steps, which the prediction is about. Resident: the whole "
    "process, so with Python and its libraries; the ranks share the host's memory."
)


def memory_section(history: History, plan: dict[str, Any]) -> list[str]:
    """The lines of `## Memory`."""
    cuda = _is_cuda(plan)
    watched = cuda or bool(history.steps and history.steps[-1].get("tensor_bytes"))
    about = ABOUT_CUDA if cuda else ABOUT_TENSORS if watched else ABOUT_RESIDENT
    if watched and (check := _check(history)):
        about += f" Measured in the last {check.steps:,} steps." if check.steps > 1 else " Measured in the last step."
    lines = ["## Memory", "", "![Memory of each rank](memory.png)", "", about, ""]
    rows, device = _rows(history, plan, watched), device_bytes(plan)
    if rows:
        owner = f"of the {'device' if cuda else 'host'}'s {gib(device)}"
        columns = ("allocated", "reserved") if cuda else ("tensors", "resident")
        header = ("", *columns, owner, "against the prediction") if watched else ("", "resident", owner)
        lines += [*table(header, rows, left=1), ""]
    memory = plan.get("memory", {})
    if isinstance(parts := memory.get("parts"), dict) and parts:
        phase = f" in the phase `{memory['phase']}`" if memory.get("phase") else ""
        rows_of_parts = [(safe(str(name)), gib(number(parts, name)), f"{number(parts, name):,.0f}") for name in parts]
        lines += [f"What the prediction is made of{phase}:", ""]
        lines += [*table(("part", "size", "bytes"), rows_of_parts, left=1), ""]
    return lines


def _rows(history: History, plan: dict[str, Any], watched: bool) -> list[tuple[str, ...]]:
    cuda, device = _is_cuda(plan), device_bytes(plan)
    used = _peaks(history, "memory_bytes")
    if not watched:
        return [(f"measured, rank {rank}", gib(peak), percent(peak, device)) for rank, peak in enumerate(used)]
    # The check stands at the end of a session; while one runs, its steps have to do.
    check = _check(history)
    measured = check.measured_bytes if check else used if cuda else _peaks(history, "tensor_bytes")
    held = (check.reserved_bytes if check else _peaks(history, "reserved_bytes")) if cuda else used
    predicted = check.predicted_bytes if check else number(plan.get("memory", {}), "predicted_peak_bytes")
    rows: list[tuple[str, ...]] = []
    if math.isfinite(predicted):
        source = safe(str(plan.get("memory", {}).get("source", "formula")))
        share = percent(predicted, device) if cuda else ""
        rows.append((f"predicted peak ({source})", gib(predicted), "", share, ""))
    for rank, peak in enumerate(measured):
        beside = float(held[rank]) if held and rank < len(held) else math.nan
        share = percent(peak if cuda else beside, device)
        against = f"{peak / predicted - 1:+.1%}" if predicted > 0 else "no prediction"
        rows.append((f"measured, rank {rank}", gib(peak), gib(beside), share, against))
    if check:
        peak = max(check.outside_bytes)
        share = percent(peak, device) if cuda else ""
        rows.append(("outside of the steps, at most", gib(peak), "", share, ""))
    return rows


def peak_against_device(history: History, plan: dict[str, Any]) -> str:
    """The run's peak in one line, for the summary."""
    peaks, size = _peaks(history, "memory_bytes"), device_bytes(plan)
    if not peaks:
        return "unknown"
    if _is_cuda(plan):
        if check := _check(history):
            peaks = [max(pair) for pair in zip_longest(peaks, check.outside_bytes, fillvalue=0.0)]
        most = max(peaks)
        return f"{gib(most)} on rank {peaks.index(most)}, {percent(most, size)} of the device's {gib(size)}"
    together = "resident in all ranks together" if len(peaks) > 1 else "resident"
    return f"{gib(sum(peaks))} {together}, {percent(sum(peaks), size)} of the host's {gib(size)}"


def predicted_beside_measured(history: History) -> list[tuple[str, str]]:
    """The comparison as a row of the summary; no row where there was none."""
    check = _check(history)
    return [("Memory in the steps", safe(check.line().replace(" | ", ", ")))] if check else []


def device_bytes(plan: dict[str, Any]) -> float:
    """What the device, or the host, has; nan where the plan does not say."""
    return number(plan.get("devices", {}), "memory_bytes")


def _check(history: History) -> MemoryCheck | None:
    return MemoryCheck.of(history.memory) if history.memory else None


def _is_cuda(plan: dict[str, Any]) -> bool:
    return bool(plan.get("devices", {}).get("kind") == "cuda")


def _peaks(history: History, name: str) -> list[float]:
    """Each rank's largest memory of all steps, in bytes."""
    ranks = [record[name] for record in history.steps if record.get(name)]
    width = max(map(len, ranks), default=0)
    return [float(max(sizes[rank] for sizes in ranks if rank < len(sizes))) for rank in range(width)]
