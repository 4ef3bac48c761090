"""Markdown that holds whatever text it is given: tables, fences and folded parts of the training log."""

import re
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int | None = None) -> list[str]:
    """A Markdown table; the columns after the first `left` ones are set to the right."""
    rules = ["---" if left is None or column < left else "---:" for column in range(len(header))]
    return [_row(header), _row(rules), *(_row(row) for row in rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def details(summary: str, lines: Sequence[str]) -> list[str]:
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "", "</details>"]


def safe(text: str) -> str:
    """Any text as one line of Markdown that shows it as it is: also in a table, also when it holds HTML."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    line = re.sub(r"([\\`*\[\]|~#$])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)


def fence(text: str, language: str) -> list[str]:
    """Any text as a code block: the fence is longer than any run of backticks in it, control characters are dropped."""
    kept = "".join(char for char in "\n".join(text.splitlines()) if char in "\n\t" or char.isprintable())
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", kept)), default=0))
    return [f"{fence}{language}", *kept.split("\n"), fence]
