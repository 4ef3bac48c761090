"""What `gpt2ds memory-estimate --trace` shows in the terminal."""

import contextlib
from collections.abc import Callable, Iterator

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from gpt2ds.estimate.rows import Estimates
from gpt2ds.probe.traced_estimate import Traced, TracedRow

GIB = 2**30
WIDE_COLUMNS = 110


@contextlib.contextmanager
def trace_progress(total: int) -> Iterator[Callable[[], None]]:
    """A line about the traces while they run, on a terminal only; yields what must be called after each."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("tracing profiles"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def show_traced(estimates: Estimates, rows: tuple[TracedRow, ...]) -> None:
    """Prints the table of the traces, what its figures are, and why some rows have none."""
    console = Console(highlight=False)
    model = estimates.model
    console.print(
        f"\n[bold]{model.name}[/bold] traced: DeepSpeed's engine on meta tensors with each JSON, the last of its GPUs"
    )
    wide = console.width >= WIDE_COLUMNS
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0))
    for name in ("profile", "peak in"):
        table.add_column(name, no_wrap=True)
    for name in ("traced", *(["formula"] if wide else []), "apart", "reserved", "default"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for row in rows:
        if row.traced is not None:
            table.add_row(*_cells(row, row.traced, wide=wide), style="" if row.fits else "dim")
    if table.row_count:
        console.print(table)
        console.print(
            "GiB. traced: the most that the last GPU holds in a steady step of at most 2 micro-batches (more peak no "
            "higher). apart: the formula from it. reserved: by a replay of every allocation through the rules of "
            "PyTorch's caching allocator with expandable segments, as training sets them; default: without, where a "
            "little decides much. fits: reserved, after emptying the cache where needed, within "
            f"{estimates.room_bytes / GIB:.2f}. Nothing here is measured on a GPU."
        )
    for row in rows:
        if row.traced is None:
            console.print(f"{row.row.profile}: not traced, {row.why_not}. The formula's figures stand.", markup=False)


def explain_traced(rows: tuple[TracedRow, ...]) -> None:
    """Prints the phases of each trace: their peak, the operation there, and what was live."""
    console = Console(highlight=False)
    for row in rows:
        if row.traced is None:
            continue
        console.print(f"\n[bold]{row.row.profile}[/bold], traced in {row.traced.seconds:.0f} s")
        for phase in row.traced.phases:
            console.print(f"  {phase.name}: {phase.peak_bytes / GIB:.3f} GiB at {phase.operation}", markup=False)
            for name, size in sorted(phase.parts.items(), key=lambda part: -part[1]):
                if size >= GIB / 2000:
                    console.print(f"    {size / GIB:8.3f}  {name}", markup=False)


def _cells(row: TracedRow, traced: Traced, *, wide: bool) -> list[str]:
    *which, phase = traced.phase.split()
    fits = "yes" if traced.fits else "no"
    if traced.fits and traced.retries:
        fits += f", by emptying its cache {traced.retries}x" if wide else f" ({traced.retries})"
    return [
        row.row.profile,
        f"{phase} {which[-1]}" if which else phase,
        f"{traced.peak_bytes / GIB:.2f}",
        *([f"{row.row.peak_bytes / GIB:.2f}"] if wide else []),
        f"{traced.difference_percent:+.2f}%",
        f"{traced.reserved.expandable_bytes / GIB:.2f}",
        f"{traced.reserved.fixed_bytes / GIB:.2f}",
        fits,
    ]
