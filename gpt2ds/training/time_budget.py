"""`--hours`: a time turned into a number of steps, once, from the speed that was measured."""

import statistics
from dataclasses import dataclass, field

from gpt2ds.options import DEFAULTS
from gpt2ds.plan import Plan

# The number of steps is estimated once so much of the time has gone, but not before so many steps.
ESTIMATE_AFTER_FRACTION = 0.01
ESTIMATE_AFTER_STEPS = 5

# Of the time, kept free for checkpoints in that estimate; what one takes is not known before the first.
CHECKPOINTS_SHARE = 0.02


@dataclass(slots=True)
class TimeBudget:
    """What is known of the speed, on rank 0's clock; every rank has one, and rank 0's counts."""

    plan: Plan
    step_seconds: list[float] = field(default_factory=list)
    evaluation_seconds: float = 0.0

    def used(self, elapsed_seconds: float) -> float:
        """Share of --hours that is gone; 0 without."""
        hours = self.plan.schedule.hours
        return elapsed_seconds / (hours * 3600) if hours else 0.0

    def estimate_due(self, used: float) -> bool:
        """Whether enough steps were seen to say how many there will be."""
        return len(self.step_seconds) >= ESTIMATE_AFTER_STEPS and used >= ESTIMATE_AFTER_FRACTION

    def decay_due(self, used: float) -> bool:
        """Whether warm-up-stable-decay must start its decay now to end in time."""
        schedule = self.plan.schedule
        enough = len(self.step_seconds) >= ESTIMATE_AFTER_STEPS
        return enough and schedule.kind == "wsd" and used >= 1 - schedule.decay_fraction

    def steps_left(self, elapsed_seconds: float, evaluate_every: int | None) -> tuple[float, int]:
        """(seconds of a step, steps that still end in time)."""
        budget = (self.plan.schedule.hours or 0.0) * 3600
        left = budget - elapsed_seconds - self.evaluation_seconds  # one evaluation comes after the last step
        if left > self.plan.options.get("save_minutes") * 60:
            left *= 1 - CHECKPOINTS_SHARE
        seconds = statistics.median(self.step_seconds[1:])  # the first step warms caches up
        if evaluate_every:
            seconds += self.evaluation_seconds / evaluate_every
        else:
            left -= min(left / 2, left / budget * DEFAULTS["evaluations"][0] * self.evaluation_seconds)
        return seconds, max(1, int(left / seconds))
