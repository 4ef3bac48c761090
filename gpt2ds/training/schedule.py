"""The learning rate as a pure function of the step, so that it cannot drift when steps are skipped or a run is
resumed.
"""

import math
from dataclasses import dataclass, replace

from gpt2ds.plan import Schedule, warmup_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRate:
    """A schedule whose course is known as far as it is known; what a checkpoint stores of it is `to_dict`."""

    kind: str
    peak_lr: float
    min_lr_ratio: float
    warmup_steps: int
    total_steps: int | None
    decay_start: int | None
    """Warm-up-stable-decay: first step of the decay; None while it is not known."""
    climb_start: int = 0
    """First step of the climb to the peak, and the rate before it: not 0 when --hours set its length on the way."""
    climb_start_lr: float = 0.0
    held_lr: float | None = None
    """The rate until the number of steps is known, for a run that goes on with other --hours."""
    released_at: int | None = None
    """From this step on it goes over to the course, within as many steps as the warm-up has."""

    @classmethod
    def of(cls, schedule: Schedule) -> "LearningRate":
        """The schedule of a plan; under --hours its end is still open."""
        rate = cls(
            kind=schedule.kind,
            peak_lr=schedule.peak_lr,
            min_lr_ratio=schedule.min_lr_ratio,
            warmup_steps=schedule.warmup_steps,
            total_steps=None,
            decay_start=None,
        )
        if schedule.total_steps is None:
            return rate
        return rate.ending_at(schedule.total_steps, schedule.decay_fraction)

    def ending_at(self, total_steps: int, decay_fraction: float) -> "LearningRate":
        """The same schedule with its end decided."""
        start = None
        if self.kind == "wsd":
            start = max(self.warmup_steps, total_steps - max(1, round(total_steps * decay_fraction)))
        return replace(self, total_steps=total_steps, decay_start=start)

    def with_default_warmup(self, step: int, total_steps: int) -> "LearningRate":
        """The warm-up that fits a run of so many steps, when the user named none and `step` steps are done.

        One that is over stays as it was; else the rate climbs on from where it is, for at least as many steps again,
        but not for more than half of those that are left.
        """
        if step >= self.warmup_steps:
            return self
        end = min(max(warmup_steps(total_steps), 2 * step, 1), step + max(1, (total_steps - step) // 2))
        return replace(self, climb_start=step, climb_start_lr=self.at(step - 1) if step else 0.0, warmup_steps=end)

    def decaying_from(self, step: int, total_steps: int) -> "LearningRate":
        """Warm-up-stable-decay that starts its decay now, because the clock says so."""
        return replace(self, decay_start=step, total_steps=max(total_steps, step + 1))

    def at(self, step: int) -> float:
        """The learning rate of step 0, 1, 2, ...: linear warm-up that reaches the peak at `warmup_steps`, then the
        course.

        cosine: half a cosine from the peak to min_lr_ratio of it at total_steps. wsd: the peak until decay_start, then
        linearly down to min_lr_ratio of it. constant: the peak.
        """
        if self.held_lr is None:
            return self._course(step)
        if self.released_at is None:
            return self.held_lr
        done = min(1.0, (step - self.released_at + 1) / max(1, self.warmup_steps))
        return self.held_lr + (self._course(step) - self.held_lr) * done

    def _course(self, step: int) -> float:
        if step < self.warmup_steps:
            done = (step + 1 - self.climb_start) / (self.warmup_steps - self.climb_start)
            return self.climb_start_lr + (self.peak_lr - self.climb_start_lr) * done
        low = self.peak_lr * self.min_lr_ratio
        if self.kind == "constant" or self.total_steps is None:
            return self.peak_lr
        if self.kind == "cosine":
            done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
            return low + (self.peak_lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        assert self.kind == "wsd", self.kind
        if self.decay_start is None or step < self.decay_start:
            return self.peak_lr
        done = (step - self.decay_start) / max(1, self.total_steps - self.decay_start)
        return self.peak_lr - (self.peak_lr - low) * min(1.0, done)
