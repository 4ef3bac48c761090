"""Whether the numbers of a run still make sense: steps without a finite gradient, and losses far above their course."""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from itertools import pairwise

# So many steps in a row without a finite gradient are no accident of one batch. fp16's loss scale takes up to 17 to
# come down from 65,536 to 1.
NON_FINITE_STEPS_MOST = 25

# A loss so many standard deviations above its level, and by so much, in so many steps in a row is a spike: one batch
# alone can be odd. 6 sigma of a normal noise come once in 10^9 steps.
SPIKE_DEVIATIONS = 6.0
SPIKE_LEAST_NATS = 0.3
SPIKE_STEPS = 5

# What spoilt the weights came before the first bad loss, which is that of the weights before its step: an update, or
# the momentum of one, shows within a few steps.
LEAD_STEPS = 5

# The level is the median of so few losses that a falling one is not far from it; the noise is judged from more.
LEVEL_STEPS = 10
NOISE_STEPS = 50

# Returns to an earlier checkpoint, without a new one in between, after which going back once more will not help.
RETURNS_MOST = 3


class Health:
    """Watches loss and gradients step by step; the same on all ranks, because they see the same numbers."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        """losses: of the last good steps of an earlier session, its `losses`."""
        self.steps_in_trouble = 0
        """How many of the last steps were bad, without a good one between them."""
        self._skipped_in_a_row = 0
        self._high_in_a_row = 0
        self._losses: deque[float] = deque(losses, maxlen=NOISE_STEPS)

    def saw(self, loss: float, taken: bool) -> str | None:
        """Notes one step; a sentence when the run should go back to before the last `steps_in_trouble` steps.

        loss: the mean over the global batch, in nats. taken: whether the gradient was finite.
        """
        if not taken or not math.isfinite(loss):
            self.steps_in_trouble += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row < NON_FINITE_STEPS_MOST:
                return None
            return f"The gradient was not finite in {self._skipped_in_a_row} steps in a row."
        self._skipped_in_a_row = 0
        level, noise = self._level(), self._noise()
        high = loss - level > max(SPIKE_DEVIATIONS * noise, SPIKE_LEAST_NATS)
        if len(self._losses) < NOISE_STEPS or not high:
            self._high_in_a_row = self.steps_in_trouble = 0
            self._losses.append(loss)
            return None
        self._high_in_a_row += 1
        self.steps_in_trouble += 1
        if self._high_in_a_row < SPIKE_STEPS:
            return None
        return (
            f"The loss was {loss:.3f} and far above its level of {level:.3f} (its noise has a standard deviation of "
            f"{noise:.3f}) in {SPIKE_STEPS} steps in a row."
        )

    @property
    def losses(self) -> list[float]:
        """Of the last good steps, by which a jump is seen."""
        return list(self._losses)

    def forget_trouble(self) -> None:
        """After a return: the bad steps did not happen."""
        self.steps_in_trouble = self._skipped_in_a_row = self._high_in_a_row = 0

    def _level(self) -> float:
        return statistics.median(list(self._losses)[-LEVEL_STEPS:]) if self._losses else math.inf

    def _noise(self) -> float:
        """The standard deviation of the losses around their course, whichever way that goes: from the median difference
        of neighbours, which for normal noise is 0.6745 times the square root of 2 standard deviations.
        """
        differences = [abs(later - earlier) for earlier, later in pairwise(self._losses)]
        return statistics.median(differences) / (0.6745 * math.sqrt(2)) if differences else math.inf
