"""When a run saves by itself, on a clock that the test turns."""

import pytest

from gpt2ds.options import TrainOptions
from gpt2ds.training import saving
from gpt2ds.training.saving import FIRST_SAVE_SECONDS, SAVING_SHARE, Saving


class Clock:
    """Seconds that pass when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(saving.time, "monotonic", lambda: self.now)


def first_due(one: Saving, clock: Clock) -> float:
    """Seconds until a checkpoint is due."""
    start = clock.now
    while not one.due(step=1):
        clock.now += 1
    return clock.now - start


def test_the_first_comes_early_and_saving_takes_little_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    one = Saving(TrainOptions())
    assert first_due(one, clock) == FIRST_SAVE_SECONDS
    one.saved(1, seconds=6.0, val_loss=None)
    assert first_due(one, clock) == 30 * 60
    one.saved(1, seconds=60.0, val_loss=None)
    assert first_due(one, clock) == 60 / SAVING_SHARE
    one.failed()
    assert first_due(one, clock) == 60 / SAVING_SHARE


def test_what_the_user_says_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    by_minutes = Saving(TrainOptions(save_minutes=2))
    assert first_due(by_minutes, clock) == 120
    by_minutes.saved(1, seconds=60.0, val_loss=None)
    assert first_due(by_minutes, clock) == 120
    by_steps = Saving(TrainOptions(save_every=5))
    clock.now += 10**6
    assert [step for step in range(1, 12) if by_steps.due(step)] == [5, 10]


def test_the_best_is_saved_where_that_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    one = Saving(TrainOptions())
    clock.now += 10**6
    assert one.is_best(4.0) and not one.is_cheap(), "nobody knows yet what one takes"
    one.saved(1, seconds=2.0, val_loss=4.0)
    clock.now += 2.0 / SAVING_SHARE - 1
    assert not one.is_cheap()
    clock.now += 1
    assert one.is_cheap()
    assert one.is_best(3.9) and not one.is_best(4.0) and not one.is_best(None)


def test_a_grace_period_that_is_too_short_is_said() -> None:
    one = Saving(TrainOptions())
    one.saved(1, seconds=25.0, val_loss=None)
    assert one.grace_problem(busy_seconds=4.0) is None
    problem = one.grace_problem(busy_seconds=6.0)
    assert problem is not None and "needs about 31 s" in problem and "--signal=TERM@62" in problem
