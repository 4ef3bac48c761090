"""The run's five pictures, drawn from its `History` alone, readable in a README at a width of 800 pixels.

No pyplot: a `Figure` of its own per picture needs no display, no global state and no backend switch.
"""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from gpt2ds.files import write_atomically
from gpt2ds.runlog.metrics import History, gib, number, perplexity, short_count

Floats = NDArray[np.float64]

ZOOM_FROM_POINTS = 30

BLUE, ORANGE, GREEN, RED, GREY = "#1f6fb4", "#e07b1a", "#2c8c4a", "#c8322f", "#8a8f98"
RANK_COLOURS = (BLUE, ORANGE, GREEN, "#7a52a8", "#a0522d", "#d65fa5", "#5f6b76", "#17a2b8")


def write_plots(history: History, plan: dict[str, Any], folder: Path) -> list[Path]:
    """Write train_loss, val_loss, throughput, memory and learning_rate `.png` into `folder`; returns their paths.

    Works with no record at all (the picture says so) and with values that are not finite (left out, and marked).
    """
    pictures: dict[str, Callable[[Figure, History, dict[str, Any]], None]] = {
        "train_loss": _train_loss,
        "val_loss": _val_loss,
        "throughput": _throughput,
        "memory": _memory,
        "learning_rate": _learning_rate,
    }
    paths = []
    for name, draw in pictures.items():
        figure = Figure(figsize=(8, 5.5 if name == "learning_rate" else 4.5), dpi=150, layout="constrained")
        draw(figure, history, plan)
        _legend(figure)
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})  # the same history, the same bytes
        path = folder / f"{name}.png"
        write_atomically(path, image.getvalue())
        paths.append(path)
    return paths


def _train_loss(figure: Figure, history: History, plan: dict[str, Any]) -> None:
    axes = _axes(figure, "Training loss", "cross entropy (nats per token)")
    steps, losses = _column(history.steps, "step"), _column(history.steps, "loss")
    finite = np.isfinite(losses)
    if finite.any():
        _draw_loss(axes, steps[finite], losses[finite])
        late = finite & (steps >= 0.3 * steps[-1])
        if late.sum() >= ZOOM_FROM_POINTS:
            _draw_loss(_zoom(axes), steps[late], losses[late], window=_window(int(finite.sum())))
    _mark_not_finite(axes, steps[~finite], "loss not finite")
    _finish(axes, history, empty=not len(steps))


def _draw_loss(axes: Axes, steps: Floats, losses: Floats, window: int | None = None) -> None:
    """Each step thin, their running mean thick. A single spike must not flatten the curve: what lies far beyond the
    rest is cut off at the upper edge, marked there, and left out of the mean."""
    window = window or _window(len(losses))
    low, high = float(losses.min()), float(losses.max())
    ordinary = max(float(losses[0]), float(np.percentile(losses, 99)))
    edge = high
    if high - low > 1.5 * (ordinary - low) > 0:
        edge = low + 1.2 * (ordinary - low)
        axes.set_ylim(low - 0.05 * (edge - low), edge)
        beyond = steps[losses > edge]
        label = f"beyond the scale ({len(beyond):,}, up to {high:,.4g})"
        axes.plot(beyond, np.full(len(beyond), 0.98), "^", color=RED, transform=axes.get_xaxis_transform(), label=label)
    _draw_steps(axes, steps, losses, BLUE, window, edge)


def _draw_steps(
    axes: Axes, steps: Floats, values: Floats, colour: str, window: int | None = None, edge: float = math.inf
) -> None:
    """Each step thin, the running mean of those up to `edge` thick."""
    window = window or _window(len(values))
    marker = "o" if len(values) < 3 else None
    axes.plot(steps, np.minimum(values, edge), color=colour, linewidth=0.7, alpha=0.4, marker=marker, label="each step")
    ordinary = values <= edge
    if window > 1:
        smooth = _smoothed(values[ordinary], window)
        axes.plot(steps[ordinary], smooth, color=colour, linewidth=1.8, label=f"mean of {window} steps")


def _val_loss(figure: Figure, history: History, plan: dict[str, Any]) -> None:
    axes = _axes(figure, "Validation loss", "cross entropy (nats per token)")
    steps, losses = _column(history.evaluations, "step"), _column(history.evaluations, "val_loss")
    finite = np.isfinite(losses)
    best = history.best
    if best is not None:
        late = finite & (steps >= 0.3 * steps[-1])
        for part, kept in ((axes, finite), *([(_zoom(axes), late)] if late.sum() >= 5 else [])):
            part.plot(steps[kept], losses[kept], color=BLUE, linewidth=1.3, marker="o", markersize=3.5)
            if kept[np.searchsorted(steps, best["step"])]:
                loss = best["val_loss"]
                label = f"best: {loss:.4f}, perplexity {perplexity(loss):,.1f}, at step {best['step']:,}"
                part.plot([best["step"]], [loss], "*", color=ORANGE, markersize=12, label=label, zorder=5)
        _perplexity_scale(axes)
    _mark_not_finite(axes, steps[~finite], "loss not finite")
    _finish(axes, history, empty=not len(steps), what="evaluation")


def _perplexity_scale(axes: Axes) -> None:
    """The right axis: the same points read as perplexity, exp(loss), at round values where several are in view."""
    low, high = axes.get_ylim()
    right = axes.secondary_yaxis("right")
    right.set_ylabel("perplexity")
    right.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: short_count(float(f"{perplexity(loss):.3g}"))))
    for leading in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,)):
        values = [digit * 10.0**power for power in range(math.floor(low / math.log(10)), 20) for digit in leading]
        ticks = [math.log(value) for value in values if low <= math.log(value) <= high]
        if 3 <= len(ticks) <= 9:
            right.set_yticks(ticks)
            right.yaxis.set_minor_locator(NullLocator())
            return


def _throughput(figure: Figure, history: History, plan: dict[str, Any]) -> None:
    axes = _axes(figure, "Throughput", "tokens per second")
    steps, rates = _column(history.steps, "step"), _column(history.steps, "tokens_per_second")
    finite = np.isfinite(rates)
    steps, rates, mfu = steps[finite], rates[finite], _column(history.steps, "mfu")[finite]
    if len(rates):
        top = 1.15 * float(np.percentile(rates, 99)) or 1.0
        _draw_steps(axes, steps, rates, GREEN, edge=top)
        median = float(np.median(rates))
        axes.axhline(median, color=GREY, linewidth=1, linestyle="-.", label=f"median {median:,.0f} tokens/s")
        axes.set_ylim(0, top)
        # MFU is tokens/s times a constant of the run, so it is a second scale of the same curve.
        known = np.isfinite(mfu) & (rates > 0)
        ratio = float(np.median(mfu[known] / rates[known])) if known.any() else 0.0
        if ratio > 0:
            axes.secondary_yaxis("right", functions=_times(100 * ratio)).set_ylabel("MFU (%)")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.0f}"))
    _finish(axes, history, empty=not len(rates))


def _memory(figure: Figure, history: History, plan: dict[str, Any]) -> None:
    devices, memory = plan.get("devices", {}), plan.get("memory", {})
    cuda = devices.get("kind") == "cuda"
    # A session that was not watched has the resident size only, and both in one picture would look like a jump.
    tensors = bool(history.steps) and all(record.get("tensor_bytes") for record in history.steps)
    name, what = ("tensor_bytes", "tensors") if tensors else ("memory_bytes", "peak allocated" if cuda else "resident")
    axes = _axes(figure, "Memory of each rank", f"GiB, {what}")
    recorded = [record for record in history.steps if record.get(name)]
    steps, used = _column(recorded, "step"), _by_rank(recorded, name)
    marker = "o" if len(steps) < 3 else None
    if used.shape[1] > len(RANK_COLOURS):
        low, high = np.nanmin(used, axis=1), np.nanmax(used, axis=1)
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.3, label=f"{used.shape[1]} ranks, least to most")
        axes.plot(steps, high, color=BLUE, linewidth=1.5, marker=marker)
    else:
        for rank in range(used.shape[1]):
            axes.plot(steps, used[:, rank], color=RANK_COLOURS[rank], marker=marker, label=f"rank {rank}")
    top = float(np.nanmax(used)) if used.size else 0.0
    name, what = ("memory_bytes", "resident") if tensors else ("reserved_bytes", "reserved by the allocator")
    if used.size and (reserved := [record for record in recorded if record.get(name)]):
        most = np.nanmax(_by_rank(reserved, name), axis=1)
        axes.plot(_column(reserved, "step"), most, color=GREY, linewidth=1, label=f"most {what}")
        top = max(top, float(most.max()))
    if used.size and (predicted := (memory.get("predicted_peak_bytes") or 0) / 2**30):
        label = f"predicted peak {gib(predicted * 2**30)}"
        axes.axhline(predicted, color=ORANGE, linestyle="--", linewidth=1.3, label=label)
        top = max(top, predicted)
    if used.size and (size := (devices.get("memory_bytes") or 0) / 2**30):
        label = f"{'each device' if cuda else 'the host'} has {gib(size * 2**30)}"
        if top > 0.15 * size:
            axes.axhline(size, color=RED, linewidth=1.3, label=label)
            top = max(top, size)
        else:
            axes.plot([], [], " ", label=f"{label} (beyond the scale)")
    axes.set_ylim(0, 1.1 * top or 1)
    _finish(axes, history, empty=not used.size)


def _by_rank(records: Sequence[dict[str, Any]], name: str) -> Floats:
    """(records, ranks) in GiB; nan where a session had fewer ranks."""
    ranks = max((len(record[name]) for record in records), default=0)
    table = np.full((len(records), ranks), math.nan)
    for row, record in enumerate(records):
        table[row, : len(record[name])] = np.array(record[name], dtype=float) / 2**30
    return table


def _learning_rate(figure: Figure, history: History, plan: dict[str, Any]) -> None:
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps, rates, norms = (_column(history.steps, name) for name in ("step", "lr", "grad_norm"))
    _style(upper, "Learning rate", "")
    upper.plot(steps, rates, color=BLUE, linewidth=1.5, marker="o" if len(steps) < 3 else None)
    upper.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.3g}"))
    _style(lower, "Gradient norm before clipping", "")
    finite = np.isfinite(norms)
    if finite.any():
        _draw_steps(lower, steps[finite], norms[finite], ORANGE)
        least = float(norms[finite].min())
        if 0 < 50 * least < float(norms[finite].max()):
            lower.set_yscale("log")
    _mark_not_finite(lower, steps[~finite], "not finite")
    _finish(upper, history, empty=not len(steps))
    _finish(lower, history, empty=not len(steps), tokens=False)
    upper.set_xlabel("")


def _column(records: Sequence[dict[str, Any]], name: str) -> Floats:
    return np.array([number(record, name) for record in records], dtype=np.float64)


def _window(points: int) -> int:
    return max(1, points // 50)


def _smoothed(values: Floats, window: int) -> Floats:
    """Centred running mean of finite values; at the ends over what there is."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    first = np.maximum(centre - window // 2, 0)
    last = np.minimum(centre + (window - 1) // 2 + 1, len(values))
    return np.asarray((sums[last] - sums[first]) / (last - first), dtype=np.float64)


def _times(factor: float) -> tuple[Callable[[ArrayLike], Floats], Callable[[ArrayLike], Floats]]:
    """The two directions of a second scale that is a multiple of the first."""
    return (lambda values: np.asarray(values, dtype=float) * factor), (
        lambda values: np.asarray(values, dtype=float) / factor
    )


def _axes(figure: Figure, title: str, label: str) -> Axes:
    axes = figure.subplots()
    _style(axes, title, label)
    return axes


def _style(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _zoom(axes: Axes) -> Axes:
    """A window in the empty upper right corner: the last 70% of the steps at their own height."""
    zoom: Axes = axes.inset_axes((0.36, 0.4, 0.62, 0.56))
    zoom.grid(alpha=0.25, linewidth=0.6)
    zoom.tick_params(labelsize=8)
    zoom.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    zoom.xaxis.set_major_formatter(FuncFormatter(_whole))
    return zoom


def _whole(value: float, _position: int | None = None) -> str:
    return f"{value:,.0f}"


def _mark_not_finite(axes: Axes, steps: Floats, label: str) -> None:
    if len(steps):
        heights = np.full(len(steps), 0.97)
        label = f"{label} ({len(steps)} steps)"
        axes.plot(steps, heights, "x", color=RED, transform=axes.get_xaxis_transform(), label=label)


def _finish(axes: Axes, history: History, empty: bool, what: str = "step", tokens: bool = True) -> None:
    """What all pictures share: resumes and incidents, both x axes, and a sentence where there is nothing to show."""
    for records, colour, style, label in (
        (history.resumes, GREY, "--", "resumed"),
        (history.incidents, RED, ":", "incident"),
    ):
        for step in sorted({record["step"] for record in records}):
            axes.axvline(step, color=colour, linestyle=style, linewidth=1, label=label, zorder=1)
    if empty:
        axes.text(0.5, 0.5, f"no {what} recorded yet", transform=axes.transAxes, ha="center", va="center", color=GREY)
    last = max(1, history.last_step)
    axes.set_xlim(-0.015 * last, 1.015 * last)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.xaxis.set_major_formatter(FuncFormatter(_whole))
    if tokens:
        _tokens_scale(axes, history)


def _legend(figure: Figure) -> None:
    """One legend under the picture, where it can hide no data; each label once."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        columns = 3 if len(entries) < 9 else 4
        figure.legend(
            entries.values(), entries.keys(), loc="outside lower left", ncols=columns, fontsize=8.5, frameon=False
        )


def _tokens_scale(axes: Axes, history: History) -> None:
    """The upper axis: tokens, where every step trained on as many as every other."""
    counted = [record for record in history.steps if record["step"] > 0 and number(record, "tokens") > 0]
    if not counted:
        return
    steps, tokens = _column(counted, "step"), _column(counted, "tokens")
    each = tokens[-1] / steps[-1]
    if np.abs(tokens - each * steps).max() > 0.02 * tokens[-1]:
        return
    size, unit = (1e9, "billion") if tokens[-1] >= 2e9 else (1e6, "million") if tokens[-1] >= 2e6 else (1e3, "thousand")
    upper = axes.secondary_xaxis("top", functions=_times(each / size))
    upper.set_xlabel(f"tokens ({unit})", fontsize=9)
    upper.tick_params(labelsize=9)
