"""Whether the numbers of a run still make sense: steps without a finite gradient, and losses far above their course."""

import math

# So many steps in a row without a finite gradient are no accident of one batch. fp16's loss scale takes up to 17 to
# come down from 65,536 to 1.
NON_FINITE_STEPS_MOST = 25

# A loss so many standard deviations above its running mean, and by so much, in so many steps in a row is a spike: one
# batch alone can be odd. 6 sigma of a normal noise come once in 10^9 steps.
SPIKE_DEVIATIONS = 6.0
SPIKE_LEAST_NATS = 0.3
SPIKE_STEPS = 5

# The running mean looks back over about so many steps, and is believed after so many.
MEMORY_STEPS = 100
LEARN_STEPS = 50

# Returns to an earlier checkpoint, without a new one in between, after which going back once more will not help.
RETURNS_MOST = 3


class Health:
    """Watches loss and gradients step by step; the same on all ranks, because they see the same numbers."""

    def __init__(self) -> None:
        self._skipped_in_a_row = 0
        self._high_in_a_row = 0
        self._seen = 0
        self._mean = 0.0
        self._variance = 0.0

    @property
    def steps_in_trouble(self) -> int:
        """How many of the last steps were bad."""
        return max(self._skipped_in_a_row, self._high_in_a_row)

    def saw(self, loss: float, taken: bool) -> str | None:
        """Notes one step; a sentence when the run should go back to before the last `steps_in_trouble` steps.

        loss: the mean over the global batch, in nats. taken: whether the gradient was finite.
        """
        self._skipped_in_a_row = 0 if taken else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= NON_FINITE_STEPS_MOST:
            return f"The gradient was not finite in {self._skipped_in_a_row} steps in a row."
        if not math.isfinite(loss):
            return None
        above = loss - self._mean
        deviation = math.sqrt(self._variance)
        high = self._seen >= LEARN_STEPS and above > max(SPIKE_DEVIATIONS * deviation, SPIKE_LEAST_NATS)
        if not high:
            self._high_in_a_row = 0
            self._learn(loss)
            return None
        self._high_in_a_row += 1
        if self._high_in_a_row < SPIKE_STEPS:
            return None
        return (
            f"The loss was {loss:.3f} and far above its mean of {self._mean:.3f} (standard deviation {deviation:.3f}) "
            f"in {SPIKE_STEPS} steps in a row."
        )

    def forget_trouble(self) -> None:
        """After a return: the bad steps did not happen."""
        self._skipped_in_a_row = self._high_in_a_row = 0

    def _learn(self, loss: float) -> None:
        # A plain mean at first, then an exponential one (West 1979, incremental mean and variance).
        self._seen += 1
        weight = 1 / min(self._seen, MEMORY_STEPS)
        difference = loss - self._mean
        self._mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference**2)
