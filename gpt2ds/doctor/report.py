"""How the doctor's findings look on a terminal and in JSON."""

import json
from collections.abc import Iterable
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt2ds.doctor.finding import Finding

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}
LEVEL_COLUMNS = max(map(len, STYLES))
CHECK_COLUMNS = len("shared memory")


def show(findings: Iterable[Finding], *, as_json: bool) -> bool:
    """Prints every finding, on a terminal as soon as it comes; returns whether there was a problem."""
    found = []
    console = Console(highlight=False)
    for finding in findings:
        found.append(finding)
        if not as_json:
            console.print(_line(finding))
    problems, warnings = (sum(finding.level == level for finding in found) for level in ("problem", "warning"))
    if as_json:
        print(json.dumps({"problems": problems, "warnings": warnings, "findings": list(map(asdict, found))}, indent=1))
    else:
        console.print(Text(_summary(problems, warnings), style=STYLES["problem" if problems else "ok"]))
    return problems > 0


def _line(finding: Finding) -> Table:
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_column(width=LEVEL_COLUMNS)
    line.add_column(width=CHECK_COLUMNS)
    line.add_column(overflow="fold")
    line.add_row(Text(finding.level, style=STYLES[finding.level]), finding.check, Text(finding.found))
    if finding.fix:
        line.add_row("", "", Text(f"fix: {finding.fix}", style="bold"))
    return line


def _summary(problems: int, warnings: int) -> str:
    counts = [f"{number} {name}{'s' * (number > 1)}" for number, name in ((problems, "problem"), (warnings, "warning"))]
    return ", ".join(count for count in counts if not count.startswith("0 ")) or "Nothing is in the way of a run."
