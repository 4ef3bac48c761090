"""The picture of `gpt2ds memory-estimate --plot`: what each profile's peak is made of, and where the card ends."""

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from gpt2ds.errors import UserError
from gpt2ds.estimate.rows import Estimates, Row
from gpt2ds.files import write_atomically
from gpt2ds.memory.fit import tensor_bytes
from gpt2ds.runlog.plots import GREY, RED

GIB = 2**30

# From the left: what lives through the whole step, what the batch brings, what comes and goes. Related parts are shades
# of one colour.
COLOURS = {
    "weights": "#17507f",
    "gathered weights": "#3b82bd",
    "bf16 copies of the weights": "#8fbbe0",
    "master weights": "#b35c0d",
    "moments": "#e8943d",
    "gradients": "#8e2a28",
    "fp32 gradients for the step": "#c8524f",
    "head gradient": "#dd8886",
    "gradient in flight": "#edb9b8",
    "reduce buckets": "#6c4a94",
    "offload staging": "#a68bc4",
    "step buffers": "#c9b8dc",
    "activations": "#1f6d3a",
    "working set of a block": "#57a773",
    "logits of a chunk": "#a3d3b1",
    "gradient of the last hidden states": "#cfe8d6",
}
OTHER = "other"

# Fewer profiles have room for a step of each part.
STEPS_MOST = 3
NAMED_SHARE = 0.055
SMALL_SHARE = 0.004


def check_picture(path: Path) -> None:
    """Raises UserError when a picture cannot bear this name."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--plot {path}: a picture's name ends in .png.")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: No such file or directory: create {path.parent}, or give another folder.")


def write_plot(estimates: Estimates, path: Path) -> Path:
    """Writes the picture: with few profiles a waterfall of each, with more a bar of each. Raises UserError."""
    check_picture(path)
    rows = estimates.rows
    if len(rows) <= STEPS_MOST:
        heights = [1.15 + 0.26 * len(_parts(row)) for row in rows]
        figure = Figure(figsize=(8, 1.1 + sum(heights)), dpi=150, layout="constrained")
        grid = figure.subplots(len(rows), 1, squeeze=False, sharex=True, height_ratios=heights)
        panels = list(grid[:, 0])
        for axes, row in zip(panels, rows, strict=True):
            _waterfall(axes, row)
        bottom = panels[-1]
    else:
        figure = Figure(figsize=(8, 2.2 + 0.33 * len(rows)), dpi=150, layout="constrained")
        panels = [bottom := figure.subplots()]
        _bars(bottom, rows)
        _legend(figure, rows)
    _limits(figure, panels, estimates)
    bottom.set_xlabel("GiB on each GPU at the predicted peak (formula, not measured on a GPU)", fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})  # the same estimate, the same bytes
    try:
        write_atomically(path, image.getvalue())
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written: {error.strerror}.") from error
    return path


def _waterfall(axes: Axes, row: Row) -> None:
    """Each part on a line of its own, beginning where the one above ends."""
    parts = _parts(row)
    below = 0.0
    for line, (name, size) in enumerate(parts):
        axes.barh(line, size, left=below, color=_colour(name), height=0.72, zorder=2)
        if line:
            axes.plot([below, below], [line - 1.36, line + 0.36], color=GREY, linewidth=0.6, zorder=1)
        _write_beside(axes, below + size, line, f"{size:.2f}")
        below += size
    axes.set_yticks(range(len(parts)), [name for name, _ in parts], fontsize=8.5)
    axes.invert_yaxis()
    axes.set_title(_about(row), loc="left", fontsize=9.5, fontweight="bold")
    _style(axes)


def _bars(axes: Axes, rows: tuple[Row, ...]) -> None:
    """One bar for each profile, its parts side by side."""
    widest = max(row.peak_bytes for row in rows) / GIB
    for line, row in enumerate(rows):
        below = 0.0
        for name, size in _parts(row):
            axes.barh(line, size, left=below, color=_colour(name), height=0.72, zorder=2)
            if size > NAMED_SHARE * widest:
                place, colour = (below + size / 2, line), _colour(name)
                dark = sum(int(colour[at : at + 2], 16) for at in (1, 3, 5)) < 420
                # On the bar's own colour, so that the limit's line does not cross it out.
                behind = {"facecolor": colour, "edgecolor": "none", "pad": 1}
                text = axes.annotate(f"{size:.1f}", place, ha="center", va="center", fontsize=7.5, bbox=behind)
                text.set(color="white" if dark else "black", zorder=5)
            below += size
        words = f"{below:.1f}" if row.fits else f"{below:.1f}, does not fit"
        _write_beside(axes, below, line, words, colour="black" if row.fits else RED)
    names = [f"{row.profile}\n{row.micro_batch}x{row.accumulation}x{row.ranks}, {row.recompute}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    _style(axes)


def _write_beside(axes: Axes, x: float, line: int, words: str, colour: str = "black") -> None:
    """Right of a bar's end, on white, for the same reason."""
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    text = axes.annotate(words, (x, line), xytext=(4, 0), textcoords="offset points", fontsize=8, bbox=white)
    text.set(color=colour, va="center", zorder=5)


def _limits(figure: Figure, panels: list[Axes], estimates: Estimates) -> None:
    """The card's limit in every panel, named once above the picture."""
    limit, room = tensor_bytes(estimates.room_bytes) / GIB, estimates.room_bytes / GIB
    widest = max(row.peak_bytes for row in estimates.rows) / GIB
    for axes in panels:
        axes.axvline(limit, color=RED, linewidth=1.3, zorder=3)
        axes.axvline(room, color=RED, linewidth=0.9, linestyle=":", zorder=3)
        axes.set_xlim(0, 1.13 * max(widest, room))
    model = estimates.model
    figure.suptitle(
        f"{model.name} ({model.parameters / 1e6:,.0f}M parameters) on {estimates.device}\n"
        f"red: {limit:.2f} GiB for tensors; dotted: {room:.2f} GiB that can be reserved for them",
        x=0.01,
        ha="left",
        fontsize=9.5,
    )


def _legend(figure: Figure, rows: tuple[Row, ...]) -> None:
    present = {name for row in rows for name, _ in _parts(row)}
    names = [name for name in (*COLOURS, OTHER) if name in present]
    handles = [Patch(color=_colour(name), label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower left", ncols=4, fontsize=8, frameon=False)


def _parts(row: Row) -> list[tuple[str, float]]:
    """(name, GiB) in the order of COLOURS; what is too small to be seen, or has no colour, together."""
    small = SMALL_SHARE * row.peak_bytes
    shown = [(name, row.parts[name] / GIB) for name in COLOURS if row.parts.get(name, 0) > small]
    rest = row.peak_bytes / GIB - sum(size for _, size in shown)
    return [*shown, (OTHER, rest)] if rest > 0.001 else shown


def _colour(name: str) -> str:
    return COLOURS.get(name, "#b9bec5")


def _about(row: Row) -> str:
    margin = f"{abs(row.margin_bytes) / GIB:.2f} GiB {'to spare' if row.fits else 'too much'}"
    batch = f"{row.micro_batch}x{row.accumulation}x{row.ranks}, recompute {row.recompute}"
    return f"{row.profile}, {batch}\n{row.peak_bytes / GIB:.2f} GiB in the phase: {row.phase}; {margin}"


def _style(axes: Axes) -> None:
    axes.grid(axis="x", alpha=0.25, linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
