"""The table of `gpt2ds memory-estimate` in the terminal."""

from rich import box
from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from gpt2ds.estimate import Estimates, Row

GIB = 2**30
PARTS_SHOWN = 3
WIDE_COLUMNS = 130
BAR_COLUMNS = 24


def show(estimates: Estimates) -> None:
    """Prints the table and what its figures are."""
    console = Console(highlight=False)
    model = estimates.model
    console.print(
        f"[bold]{model.name}[/bold] ({model.parameters / 1e6:,.0f}M parameters) on {estimates.device}: "
        f"{estimates.room_bytes / GIB:.2f} GiB can be reserved",
        markup=True,
    )
    wide = console.width >= WIDE_COLUMNS
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0))
    for name in ("profile", "batch", "recompute"):
        table.add_column(name, no_wrap=True)
    for name in ("peak", "free", "largest", "host"):
        table.add_column(name, justify="right", no_wrap=True)
    if wide:
        table.add_column("where the peak is, and what makes it")
    for row in estimates.rows:
        table.add_row(*_cells(row, wide=wide), style="" if row.fits else "dim")
    console.print(table)
    console.print(
        "GiB. batch: micro-batch x accumulation x GPUs. peak: of each GPU, by formula (a trace of the engine agrees "
        "within 0.2%, ZeRO-3 on several GPUs 2%), not measured on a GPU. free: of what can be reserved less 3.4% for "
        "the allocator; in brackets what is missing. largest: micro-batch, all else equal. host: of each machine."
    )


def explain(estimates: Estimates) -> None:
    """Prints what the peak of each profile is made of: its parts one on top of the other."""
    console = Console(highlight=False)
    for row in estimates.rows:
        console.print(
            f"\n[bold]{row.profile}[/bold]: {row.peak_bytes / GIB:.2f} GiB at its peak, {row.phase}", markup=True
        )
        table = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(4):
            table.add_column(no_wrap=True)
        below = 0
        for name, size in sorted(row.parts.items(), key=lambda part: -part[1]):
            bar = Bar(row.peak_bytes, below, below + size, width=BAR_COLUMNS)
            table.add_row(f"  {name}", f"{size / GIB:6.2f}", f"{size / row.peak_bytes:4.0%}", bar)
            below += size
        console.print(table)


def _cells(row: Row, *, wide: bool) -> list[str]:
    largest = sorted(row.parts.items(), key=lambda part: -part[1])[:PARTS_SHOWN]
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    margin = f"{abs(row.margin_bytes) / GIB:.1f}"
    cells = [
        row.profile,
        f"{row.micro_batch}x{row.accumulation}x{row.ranks}",
        row.recompute + (f" +{row.recompute_percent:g}%" if wide and row.recompute_percent else ""),
        f"{row.peak_bytes / GIB:.2f}",
        margin if row.fits else f"({margin})",
        str(row.largest_micro_batch) if row.largest_micro_batch else "none",
        f"{row.host_bytes / GIB:.1f}",
    ]
    return [*cells, f"{row.phase}: {parts}"] if wide else cells
