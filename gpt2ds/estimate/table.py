"""What `gpt2ds memory-estimate` prints: the table, the plans of --fit, and the bars of --explain."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from gpt2ds.estimate.fit import Fit
from gpt2ds.estimate.limits import left_out
from gpt2ds.estimate.rows import Estimates, Row
from gpt2ds.memory.fit import MICRO_BATCH_MOST
from gpt2ds.memory.mixed_precision import PRECISIONS, PlainPeak
from gpt2ds.memory.reduction import bucket_bytes
from gpt2ds.options import DEFAULTS

GIB = 2**30
PARTS_SHOWN = 3
PLANS_SHOWN = 4
WIDE_COLUMNS = 130
NARROW_COLUMNS = 54
BAR_COLUMNS = 24
WITH_BARS_COLUMNS = 80

# Below this share of fp32's peak a difference is none.
SMALL_DIFFERENCE = 0.01

# What of a rank's memory the ZeRO stages divide.
STATES = ("weights", "gathered weights", "master weights", "moments", "gradients")

# From how many times less traffic on it is worth more arithmetic to say so.
MUCH_LESS_TRAFFIC = 4


def show(estimates: Estimates, changes: Sequence[str | None] = ()) -> None:
    """Prints the table and what its figures are; below it what would make the other rows fit."""
    console = Console(highlight=False)
    _title(console, estimates)
    wide = console.width >= WIDE_COLUMNS
    figures = ["peak", "free", "largest", "host"][: 2 if console.width < NARROW_COLUMNS else 4]
    table = _table(["profile", "batch", "recompute"], figures, wide=wide)
    if wide:
        table.add_column("where the peak is, and what makes it")
    for row in estimates.rows:
        table.add_row(*_cells(row, wide=wide)[: len(table.columns)], style="" if row.fits else "dim")
    console.print(table)
    console.print(
        "GiB. batch: micro-batch x accumulation x GPUs. peak: of each GPU, by formula (a trace of the engine agrees "
        "within 0.2%, ZeRO-3 on several GPUs 2%), not measured on a GPU. free: of what can be reserved less 3.4% for "
        "the allocator; in brackets what is missing. largest: micro-batch, all else equal. host: of each machine."
    )
    if any(row.ranks > 1 for row in estimates.rows):
        _shares(console, estimates, wide=wide)
    sentences: dict[str, list[str]] = {}
    for row, change in zip(estimates.rows, changes, strict=False):
        if change:
            sentences.setdefault(change, []).append(row.profile)
    for row in estimates.rows:
        for sentence in left_out(row.source):
            sentences.setdefault(sentence, []).append(row.profile)
    for sentence, profiles in sentences.items():
        console.print(f"[bold]{', '.join(profiles)}[/bold]: {sentence}")


def show_fit(fit: Fit, command: str) -> None:
    """Prints the best plans, why the first one is first, and what starts it."""
    console = Console(highlight=False)
    estimates, best = fit.estimates, fit.best
    _title(console, estimates)
    console.print(
        f"Plans that are predicted to fit at a global batch of {fit.global_batch} "
        f"sequence{'s' * (fit.global_batch > 1)} ({fit.global_batch_from}), the fastest first:"
    )
    several = best.ranks > 1
    table = _table(
        ["plan", "batch", "recompute"], [*(["sends"] if several else []), "peak", "free", "host"], wide=False
    )
    for row in estimates.rows[:PLANS_SHOWN]:
        sent = [f"{row.traffic.total / GIB:.1f}"] if several else []
        table.add_row(
            f"{row.profile} (ZeRO-{row.zero_stage})",
            _batch(row),
            _recompute(row),
            *sent,
            f"{row.peak_bytes / GIB:.2f}",
            f"{row.margin_bytes / GIB:.1f}",
            f"{row.host_bytes / GIB:.1f}",
        )
    console.print(table)
    sends = "; sends: of each GPU in an optimizer step" if several else ""
    console.print(
        "The order: what is offloaded last, 16 bits before fp32, a micro-batch that fills the card, the least "
        "recompute, ZeRO-3 after the others, the least that crosses the link, the least memory. A judgement. "
        f"GiB, by formula, not measured on a GPU{sends}."
    )
    if quieter := _much_quieter(estimates.rows):
        console.print(
            f"Without NVLink {quieter.profile} may be faster: it sends {quieter.traffic.total / GIB:.1f} GiB a step "
            f"instead of {best.traffic.total / GIB:.1f}, for "
            f"{quieter.recompute_percent - best.recompute_percent:.1f} points more arithmetic."
        )
    for row in estimates.rows[:PLANS_SHOWN]:
        for sentence in left_out(row.source):
            console.print(f"{row.profile}: {sentence}", markup=False)
    for sentence in fit.left_out:
        console.print(f"Left out: {sentence}", markup=False)
    console.print(f"\nTake [bold]{best.profile}[/bold], with {best.host_bytes / GIB:.1f} GiB of host memory:")
    console.print(command, soft_wrap=True, markup=False)


def explain(estimates: Estimates) -> None:
    """Prints what the peak of each profile is made of: its parts one on top of the other."""
    console = Console(highlight=False)
    for row in estimates.rows:
        console.print(
            f"\n[bold]{row.profile}[/bold]: {row.peak_bytes / GIB:.2f} GiB at its peak, {row.phase}", markup=True
        )
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(overflow="fold")
        for _ in range(3):
            table.add_column(no_wrap=True)
        below = 0
        for name, size in sorted(row.parts.items(), key=lambda part: -part[1]):
            bar = [Bar(row.peak_bytes, below, below + size, width=BAR_COLUMNS)]
            if console.width < WITH_BARS_COLUMNS:
                bar = []
            table.add_row(f"  {name}", f"{size / GIB:6.2f}", f"{size / row.peak_bytes:4.0%}", *bar)
            below += size
        console.print(table)


def precision_example(rows: Sequence[Row]) -> Row:
    """The row whose setting the answer about mixed precision is computed for: the default profile's, or the first."""
    usual = Path(DEFAULTS["ds"][0]).stem
    return next((row for row in rows if row.profile == usual), rows[0])


def explain_precision(row: Row, peaks: Sequence[PlainPeak]) -> None:
    """Prints why mixed precision alone reduces nothing, with the figures of the row's own setting."""
    console = Console(highlight=False)
    setting = row.setting
    console.print(
        f"\n[bold]Why did mixed precision not reduce my memory?[/bold] {setting.model.name}, micro-batch "
        f"{row.micro_batch}, {setting.context} tokens, GiB (and the largest micro-batch):"
    )
    table = _table([""], ["as commonly written", "with fused attention"], wide=True)
    found = {(peak.precision, peak.fused_attention): peak for peak in peaks}
    names = {
        "fp32": "fp32, AdamW",
        "autocast": "torch.autocast in bf16, AdamW",
        "16 bits": f"{row.dtype if row.dtype != 'fp32' else 'bf16'} weights, states as in {row.profile}",
    }
    for precision in PRECISIONS:
        cells = [found[precision, fused] for fused in (False, True)]
        table.add_row(names[precision], *(f"{one.peak_bytes / GIB:.1f} ({one.largest_micro_batch})" for one in cells))
    table.add_row(f"{row.profile} as it is", "", f"{row.peak_bytes / GIB:.1f} ({_largest(row)})")
    console.print(table)
    plain, mixed = found["fp32", False].peak_bytes, found["autocast", False].peak_bytes
    states, casts = (each * setting.model.parameters / GIB for each in (16, 2))
    console.print(
        f"autocast leaves weights, gradients and Adam's moments in fp32 ({states:.1f} GiB) and adds a bf16 copy of "
        f"every weight ({casts:.1f}). Without a fused kernel each softmax is kept in fp32 beside its bf16 copy. "
        f"{_difference(plain, mixed)} What does reduce it: weights that are in 16 bits themselves, fused "
        "attention, a loss in chunks, recompute, states that are divided or offloaded."
    )
    console.print(
        "As commonly written: attention by matrices, whole logits in fp32. By formula, from traces of plain PyTorch; "
        "not measured on a GPU."
    )


def _difference(plain: int, mixed: int) -> str:
    """What autocast makes of fp32's peak, without a fused kernel."""
    figures = f"{mixed / GIB:.2f} GiB against {plain / GIB:.2f} in fp32"
    if abs(mixed - plain) < SMALL_DIFFERENCE * plain:
        return f"The peak stays about the same here: {figures}."
    if mixed > plain:
        return f"The peak even grows here: {figures}."
    return f"Here the other activations, which halve, outweigh both: {figures}."


def _title(console: Console, estimates: Estimates) -> None:
    model = estimates.model
    console.print(
        f"[bold]{model.name}[/bold] ({model.parameters / 1e6:,.0f}M parameters) on {estimates.device}: "
        f"{estimates.room_bytes / GIB:.2f} GiB can be reserved"
    )


def _table(left: Sequence[str], right: Sequence[str], *, wide: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0))
    for name in left:
        # Where the terminal is narrow, names fold: a figure that is cut is none.
        table.add_column(name, overflow="fold", no_wrap=name == "batch")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _shares(console: Console, estimates: Estimates, *, wide: bool) -> None:
    """What dividing costs and brings: bytes on each GPU, and bytes that each sends."""
    columns = ["ZeRO", "states", "buckets", "grads sent", "weights sent"]
    if console.width < NARROW_COLUMNS:
        columns = [name.replace(" ", "\n") for name in columns]
    table = _table(["each of several GPUs"], columns, wide=wide)
    for row in estimates.rows:
        sizes = [sum(row.parts.get(name, 0) for name in STATES), bucket_bytes(row.setting)]
        sizes += [row.traffic.gradients, row.traffic.weights]
        table.add_row(row.profile, str(row.zero_stage), *(f"{size / GIB:.2f}" for size in sizes))
    console.print(table)
    console.print(
        "GiB. states: weights, master weights, moments and gradients at the peak. buckets: while gradients are "
        "exchanged. sent: by each GPU in an optimizer step, through rings."
    )


def _cells(row: Row, *, wide: bool) -> list[str]:
    largest = sorted(row.parts.items(), key=lambda part: -part[1])[:PARTS_SHOWN]
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    margin = f"{abs(row.margin_bytes) / GIB:.1f}"
    cells = [
        row.profile,
        _batch(row),
        _recompute(row) if wide else row.recompute,
        f"{row.peak_bytes / GIB:.2f}",
        margin if row.fits else f"({margin})",
        _largest(row),
        f"{row.host_bytes / GIB:.1f}",
    ]
    return [*cells, f"{row.phase}: {parts}"] if wide else cells


def _largest(row: Row) -> str:
    """The largest micro-batch; with a + where the search ended there."""
    ended = row.largest_micro_batch == max(MICRO_BATCH_MOST, row.micro_batch)
    return f"{row.largest_micro_batch}{'+' * ended}" if row.largest_micro_batch else "none"


def _batch(row: Row) -> str:
    return f"{row.micro_batch}x{row.accumulation}x{row.ranks}"


def _recompute(row: Row) -> str:
    return row.recompute + (f" +{row.recompute_percent:g}%" if row.recompute_percent else "")


def _offloads(row: Row) -> bool:
    return row.setting.offload_optimizer or row.setting.offload_param


def _much_quieter(plans: Sequence[Row]) -> Row | None:
    """A later plan without offload that sends far less than the first one."""
    rest = [row for row in plans[1:] if not _offloads(row)]
    quietest = min(rest, key=lambda row: row.traffic.total, default=None)
    if quietest and quietest.traffic.total * MUCH_LESS_TRAFFIC < plans[0].traffic.total:
        return quietest
    return None
