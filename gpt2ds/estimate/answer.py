"""The answer of `gpt2ds memory-estimate`: estimates, the plan that fits, explanations, a trace, as asked for."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2ds.devices import this_machine
from gpt2ds.errors import UserError
from gpt2ds.estimate.change import changes_needed, is_hopeless, stop_if_hopeless
from gpt2ds.estimate.fit import Fit, NothingFitsError, check_new_profile, command, find_fit, write_profile
from gpt2ds.estimate.rows import EstimateOptions, Estimates, estimate
from gpt2ds.estimate.table import explain, explain_precision, precision_example, show, show_fit
from gpt2ds.memory.mixed_precision import compare

if TYPE_CHECKING:
    from gpt2ds.probe.traced_estimate import TracedRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What the user wants to see."""

    fit: bool = False
    write: Path | None = None
    parts: bool = False
    plot: Path | None = None
    trace: bool = False
    as_json: bool = False


def answer(options: EstimateOptions, wanted: Wanted) -> int:
    """Prints it, writes the profile and the picture that are wanted; returns the exit code, 1 when nothing fits.

    Raises UserError for mistakes, and when nothing of what the user names has any chance to fit.
    """
    if wanted.write and not wanted.fit:
        raise UserError("--write writes the plan that --fit finds: give both.")
    # A search or a trace that ends in a wrong name was for nothing.
    if wanted.write:
        check_new_profile(wanted.write)
    if wanted.plot:
        from gpt2ds.estimate.plot import check_picture, write_plot

        check_picture(wanted.plot)
    machine = this_machine()
    try:
        found = find_fit(options, machine) if wanted.fit else None
    except NothingFitsError as nothing:
        if wanted.as_json:
            print(json.dumps({"rows": [], "problem": str(nothing)}, indent=1))
        if options.ds:
            raise
        if not wanted.as_json:
            print(nothing)
        return 1
    estimates = found.estimates if found else estimate(options, machine)
    changes = () if found else changes_needed(estimates, options, machine)
    if found and wanted.write:
        write_profile(found.best, wanted.write)
    traced = _traced(estimates) if wanted.trace else ()
    if wanted.as_json:
        _print_json(options, wanted, estimates, found, changes, traced)
    else:
        _print_tables(options, wanted, estimates, found, changes, traced)
    if wanted.plot:
        write_plot(estimates, wanted.plot)
    # A trace that fits has the last word over the formula.
    if options.ds and not any(row.fits for row in traced):
        stop_if_hopeless(estimates, changes)
    return 0 if any(row.fits for row in traced or estimates.rows) else 1


def _traced(estimates: Estimates) -> "tuple[TracedRow, ...]":
    from gpt2ds.probe.traced_estimate import traced_rows
    from gpt2ds.probe.traced_report import trace_progress

    with trace_progress(len(estimates.rows)) as done:
        return traced_rows(estimates, cores=this_machine().cores, done=done)


def _print_json(
    options: EstimateOptions,
    wanted: Wanted,
    estimates: Estimates,
    found: Fit | None,
    changes: tuple[str | None, ...],
    traced: "tuple[TracedRow, ...]",
) -> None:
    result = estimates.to_dict()
    if wanted.trace:
        from gpt2ds.probe.traced_estimate import to_dict

        result = to_dict(estimates, traced)
    for row, change in zip(result["rows"], changes, strict=False):
        row["change"] = change
    result |= found.to_dict(options, wanted.write) if found else {}
    if wanted.parts:
        peaks = compare(precision_example(estimates.rows).setting, estimates.room_bytes)
        result["mixed_precision"] = [asdict(peak) for peak in peaks]
    print(json.dumps(result, indent=1))


def _print_tables(
    options: EstimateOptions,
    wanted: Wanted,
    estimates: Estimates,
    found: Fit | None,
    changes: tuple[str | None, ...],
    traced: "tuple[TracedRow, ...]",
) -> None:
    if found:
        show_fit(found, command(found.best, options, written=wanted.write))
    else:
        # What stops the command says the changes itself.
        show(estimates, () if options.ds and is_hopeless(estimates) else changes)
    if wanted.parts:
        example = precision_example(estimates.rows)
        explain(estimates)
        explain_precision(example, compare(example.setting, estimates.room_bytes))
    if wanted.trace:
        from gpt2ds.probe.traced_report import explain_traced, show_traced

        show_traced(estimates, traced)
        if wanted.parts:
            explain_traced(traced)
