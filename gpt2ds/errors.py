"""The exceptions that the user can answer. `cli` prints what they say, without a traceback, and exits with a code of
their own.
"""

MOST_LINES, MOST_CHARACTERS = 40, 1000


class UserError(ValueError):
    """A mistake in what the user gave us; the message says what is wrong and names the fix."""

    @classmethod
    def from_list(cls, problems: list[str]) -> "UserError":
        """All mistakes of one file or command in one error, a line each, so that nobody mends them one run at a
        time.
        """
        assert problems, "an error needs at least one problem"
        return cls(problems[0] if len(problems) == 1 else "\n".join(f"  - {problem}" for problem in problems))


class MemoryShortageError(Exception):
    """The run could not get the memory it needed; the message names a setting that would fit. Exit code 3."""


def readable(message: str) -> str:
    """A message as a terminal can show it, whatever a stranger's file put into it: no control characters, no line of
    more than MOST_CHARACTERS, at most MOST_LINES of them.
    """
    lines = message.split("\n")
    cut = [
        line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS // 2]} ... {line[-100:]}" for line in lines
    ]
    more = [f"  and {len(lines) - MOST_LINES:,} more lines"] if len(lines) > MOST_LINES else []
    shown = "\n".join(cut[:MOST_LINES] + more)
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in shown
    )


class RankLostError(Exception):
    """Another rank of the run died or hangs; the message names it and its last step. Exit code 1.

    speaks: whether this process is the one to tell of it.
    """

    def __init__(self, message: str, *, speaks: bool = True) -> None:
        super().__init__(message)
        self.speaks = speaks
