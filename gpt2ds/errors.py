"""The one exception that means: the user can mend this. `cli` prints its sentence and exits with code 2, without a
traceback.
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
