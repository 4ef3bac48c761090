"""Whether a run on several ranks has ended well, and another start of it when it has not.

Only the run's own marker says so: DeepSpeed's launcher ends with exit code 0 in cases in which its ranks did not.
"""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpt2ds.launcher import Launcher
from gpt2ds.run_folder import OUTCOME, RESTART_VARIABLE, complete_checkpoints, newest_run

# Of what the user can mend (2) and of memory that does not suffice (3) another start would end alike.
NEVER_RESTARTED = (2, 3)

# So many restarts in a row that end at the same step without a new checkpoint are no accident.
REPEATS_MOST = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """What the run's own marker says; rank 0 writes it as its last act."""

    exit_code: int
    completed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reached:
    """How far a run has come."""

    checkpoint: str | None
    step: int

    def is_beyond(self, earlier: "_Reached") -> bool:
        # The step before counts as the same: whether its record was still written is chance.
        return self.checkpoint != earlier.checkpoint or abs(self.step - earlier.step) > 1


def supervise(
    ranks: int,
    arguments: list[str],
    *,
    out: Path,
    name: str | None,
    resume: bool,
    restarts: int,
    tell: Callable[[str], None],
) -> int:
    """Runs `cli.py arguments` on so many ranks of this machine, again after a failure, and returns the exit code.

    out, name, resume: as in the arguments; a name that is missing is added, since the folder says how a run ended.
    Raises UserError for a number of ranks that makes no sense.
    """
    if name is None:
        newest = newest_run(out) if resume else None
        name = newest.name if newest else time.strftime("%Y%m%d-%H%M%S")
        if newest or not resume:
            arguments = [*arguments, "--name", name]
    folder = out / name
    repeats = 0
    again: list[str] = []
    environment: dict[str, str] = {}
    reached = _reached(folder)
    with Launcher(ranks) as launcher:
        for restart in range(restarts + 1):
            marker = _stamp(folder)
            code = launcher.run(arguments + again, **environment)
            outcome = _read_outcome(folder) if _stamp(folder) != marker else None
            if code in NEVER_RESTARTED:
                return code
            if launcher.received:
                return outcome.exit_code if outcome else 128 + launcher.received[0]
            # Ranks whose launcher was killed save and leave in good order, but their run is not over.
            if outcome and (outcome.completed or code >= 0):
                return outcome.exit_code
            why, earlier, reached = _why(code), reached, _reached(folder)
            repeats = repeats + 1 if restart and not reached.is_beyond(earlier) else 0
            if restart == restarts or repeats == REPEATS_MOST:
                tell(_last_words(folder, reached, why, repeats))
                return code if code > 0 else 1
            again = [] if resume or not reached.checkpoint else ["--resume"]
            environment = {} if reached.checkpoint else {RESTART_VARIABLE: "1"}
            whence = reached.checkpoint or "the start, since no checkpoint was completed"
            tell(f"Restart {restart + 1} of {restarts} of the run {folder} from {whence}: {why}.")
    raise AssertionError("the last start returns")


def _last_words(folder: Path, reached: _Reached, why: str, repeats: int) -> str:
    if repeats == REPEATS_MOST:
        return (
            f"The run {folder} is not started again: {repeats} restarts in a row ended at step {reached.step} without "
            f"a new checkpoint ({why})."
        )
    if reached.checkpoint is None:
        return f"The run {folder} did not end well: {why}. No checkpoint was completed."
    return f"The run {folder} did not end well: {why}. Its last checkpoint is {reached.checkpoint}: --resume goes on."


def _why(code: int) -> str:
    if code < 0:
        return f"DeepSpeed's launcher was killed by {signal.Signals(-code).name}"
    if code == 0:
        return "its ranks ended with exit code 0 but did not say that the run was over"
    # The launcher passes a rank's end by a signal on as an exit code of 256 less its number.
    killed = 256 - code
    if killed in {int(number) for number in signal.Signals}:
        return f"a rank was killed by {signal.Signals(killed).name}"
    return f"a rank ended with exit code {code}"


def _reached(folder: Path) -> _Reached:
    try:
        checkpoints = complete_checkpoints(folder)
    except OSError:  # a name that no folder can have: the ranks say so
        checkpoints = []
    return _Reached(checkpoint=checkpoints[-1].name if checkpoints else None, step=_last_step(folder))


def _last_step(folder: Path) -> int:
    """The last step in the metrics; 0 without one."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 65536))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("kind") == "step":
            return int(record.get("step", 0))
    return 0


def _stamp(folder: Path) -> tuple[int, int] | None:
    """Tells one marker from another: a rank that dies early leaves an earlier session's in its place."""
    try:
        status = (folder / OUTCOME).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _read_outcome(folder: Path) -> _Outcome | None:
    try:
        content = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
        return _Outcome(exit_code=int(content["exit_code"]), completed=bool(content["completed"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
