"""The exceptions that the user can answer. `cli` prints what they say, without a traceback, and exits with a code of
their own.
"""


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
