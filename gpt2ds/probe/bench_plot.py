"""The picture of a bench: memory against speed, a point for each setting that ran, with the card's limit."""

import io
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from gpt2ds.files import write_atomically
from gpt2ds.probe.bench_report import by_speed, short_name, title
from gpt2ds.runlog.metrics import gib
from gpt2ds.runlog.plots import GREY, RANK_COLOURS, RED

GIB = 2**30

# So many names find room beside their points; more get numbers and a key.
NAMED_POINTS_MOST = 10
FAILURES_NAMED_MOST = 6
LINE_CHARACTERS = 110


def write_plot(bench: dict[str, Any], folder: Path) -> Path:
    """Writes bench.png into the folder and returns its path; also when nothing ran (the picture says so)."""
    measured = [record for record in by_speed(bench) if record["result"] == "measured"]
    failed = [record for record in bench["settings"] if record["result"] != "measured"]
    profiles = list(dict.fromkeys(record["profile"] for record in bench["settings"]))
    colours = {name: RANK_COLOURS[index % len(RANK_COLOURS)] for index, name in enumerate(profiles)}
    numbered = len(measured) > NAMED_POINTS_MOST
    figure = Figure(figsize=(8, 5.5 + numbered * len(measured) / 15), dpi=150, layout="constrained")
    axes = _axes(figure, bench)
    for number, record in enumerate(measured, start=1):
        (used, speed), colour = _point(record), colours[record["profile"]]
        label = f"{number}  {short_name(record)}" if numbered else None
        axes.plot([used], [speed], "o", color=colour, markersize=6, zorder=3, label=label)
        if record["reserved_bytes"]:
            axes.plot([used, max(record["reserved_bytes"]) / GIB], [speed, speed], "|-", color=colour, linewidth=1)
    if not measured:
        axes.text(0.5, 0.5, "no setting ran", transform=axes.transAxes, ha="center", va="center", color=GREY)
    if bench["device"]["kind"] == "cuda":
        limit = bench["device"]["usable_bytes"]
        axes.axvline(limit / GIB, color=RED, linewidth=1.3, label=f"limit {gib(limit)}")
    for record in failed:
        if record["result"] == "out of memory" and record.get("predicted"):
            wanted, label = record["predicted"]["peak_bytes"] / GIB, "out of memory (at its predicted peak)"
            axes.plot([wanted], [0.015], "x", color=RED, transform=axes.get_xaxis_transform(), label=label)
    if failed:
        names = "; ".join(short_name(record) for record in failed[:FAILURES_NAMED_MOST])
        more = len(failed) - FAILURES_NAMED_MOST
        named = f"did not run: {names}" + (f" and {more} more" if more > 0 else "")
        axes.set_xlabel(f"{axes.get_xlabel()}\n{textwrap.fill(named, LINE_CHARACTERS)}")
    axes.margins(x=0.15, y=0.2)
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if entries:
        columns = 3 if numbered else 1
        figure.legend(
            entries.values(), entries.keys(), loc="outside lower left", ncols=columns, fontsize=8.5, frameon=False
        )
    names_beside = [str(number) if numbered else short_name(record) for number, record in enumerate(measured, start=1)]
    _label(figure, axes, list(zip(measured, names_beside, strict=True)), colours)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    path = folder / "bench.png"
    write_atomically(path, image.getvalue())
    return path


def _axes(figure: Figure, bench: dict[str, Any]) -> Axes:
    cuda = bench["device"]["kind"] == "cuda"
    axes: Axes = figure.subplots()
    axes.set_title(title(bench), loc="left", fontsize=9, fontweight="bold", wrap=True)
    axes.set_xlabel(
        "peak memory of the fullest rank (GiB): the point is allocated, the bar ends at reserved"
        if cuda
        else "peak resident memory of the fullest rank's process (GiB): not GPU memory, not comparable with it",
        fontsize=9,
    )
    axes.set_ylabel("tokens per second" + ("" if cuda else " on a CPU"))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.0f}"))
    return axes


def _point(record: dict[str, Any]) -> tuple[float, float]:
    return max(record["peak_bytes"]) / GIB, record["tokens_per_second"]


def _label(figure: Figure, axes: Axes, named: list[tuple[dict[str, Any], str]], colours: dict[str, str]) -> None:
    """Each point's name in the nearest place that hides no other name and no point."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    inside = axes.get_window_extent()
    taken = []
    for record, _ in named:
        (x, y), end = axes.transData.transform(_point(record)), max(record["reserved_bytes"] or [0]) / GIB
        taken.append(Bbox.from_extents(x - 7, y - 7, x + 7, y + 7))
        if end:
            taken.append(Bbox.from_extents(x, y - 4, axes.transData.transform((end, 0))[0] + 2, y + 4))
    for record, name in named:
        text = axes.annotate(
            name,
            _point(record),
            xytext=(0, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colours[record["profile"]],
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": colours[record["profile"]], "shrinkB": 3},
        )
        places = [(side, up) for up in sorted(range(-72, 73, 6), key=abs) for side in (7, -7, 30, -30)]
        for side, up in places:
            text.set_horizontalalignment("left" if side > 0 else "right")
            text.set_position((side, up))
            text.update_positions(renderer)
            box = Text.get_window_extent(text)  # an annotation's own extent has its line in it
            fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if fits and not any(box.overlaps(other) for other in taken):
                break
        taken.append(Text.get_window_extent(text))
