"""When a run saves a checkpoint, and whether the time for a last one will be there."""

import math
import time

from gpt2ds.options import TrainOptions
from gpt2ds.training.guard import GRACE_SECONDS

# The first checkpoint of a session comes early: a disk that does not take it is found out, and what one takes is known.
FIRST_SAVE_SECONDS = 180.0

# Where nobody says how often to save, saving takes at most so much of the time.
SAVING_SHARE = 0.02


class Saving:
    """What is known of a session's checkpoints so far."""

    def __init__(self, options: TrainOptions) -> None:
        self._options = options
        self._at = time.monotonic()
        self._seconds: float | None = None
        self._best_val_loss = math.inf
        self.at_step = -1
        """Step of the last checkpoint, or of the one that the session went on from."""

    def due(self, step: int) -> bool:
        """By steps where the user says so, else by the clock."""
        if self._options.save_every:
            return step % self._options.save_every == 0
        return time.monotonic() - self._at >= self._interval_seconds()

    def _interval_seconds(self) -> float:
        wanted: float = self._options.get("save_minutes") * 60
        if self._options.save_minutes:
            return wanted
        if self._seconds is None:
            return min(FIRST_SAVE_SECONDS, wanted)
        return max(wanted, self._seconds / SAVING_SHARE)

    def is_best(self, val_loss: float | None) -> bool:
        """Whether no checkpoint of this session has a validation loss as low."""
        return val_loss is not None and val_loss < self._best_val_loss

    def is_cheap(self) -> bool:
        """Whether one more would not take more than its share of the time; by this rank's clock."""
        return self._seconds is not None and time.monotonic() - self._at >= self._seconds / SAVING_SHARE

    def saved(self, step: int, seconds: float, val_loss: float | None) -> None:
        """Notes a checkpoint and what it took."""
        self.at_step, self._at, self._seconds = step, time.monotonic(), seconds
        if val_loss is not None:
            self._best_val_loss = min(self._best_val_loss, val_loss)

    def failed(self) -> None:
        """Notes one that could not be written: the next try comes when the next one would be due."""
        self._at = time.monotonic()

    def grace_problem(self, busy_seconds: float) -> str | None:
        """A sentence when the last checkpoint will not fit into the time that schedulers grant, else None.

        busy_seconds: the longest that a run goes on with something before it sees that it shall stop.
        """
        needed = (self._seconds or 0.0) + busy_seconds
        if needed <= GRACE_SECONDS:
            return None
        return (
            f"After SIGTERM this run needs about {needed:.0f} s for its last checkpoint, more than the "
            f"{GRACE_SECONDS:.0f} s that a job scheduler usually grants: ask it for more (Slurm: "
            f"--signal=TERM@{2 * needed:.0f})."
        )
