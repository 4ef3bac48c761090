"""The learning rate as a function of the step."""

import itertools
from dataclasses import replace

import pytest

from gpt2ds.plan import Schedule
from gpt2ds.training.schedule import LearningRate


def rate(kind: str, total: int | None = 100, warmup: int = 10) -> LearningRate:
    return LearningRate.of(
        Schedule(
            kind=kind,
            peak_lr=1.0,
            min_lr_ratio=0.1,
            warmup_steps=warmup,
            total_steps=total,
            decay_fraction=0.2,
            hours=None,
        )
    )


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warm_up_climbs_linearly_and_never_starts_at_zero(kind: str) -> None:
    assert [rate(kind).at(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate(kind).at(10) == pytest.approx(1.0)


def test_cosine_is_half_way_in_the_middle_and_ends_at_a_tenth() -> None:
    assert rate("cosine").at(55) == pytest.approx(0.55)
    assert rate("cosine").at(100) == pytest.approx(0.1)
    assert rate("cosine").at(1000) == pytest.approx(0.1)


def test_warmup_stable_decay_is_flat_then_linear() -> None:
    wsd = rate("wsd")
    assert [wsd.at(step) for step in (50, 79, 80)] == pytest.approx([1.0, 1.0, 1.0])
    assert wsd.at(90) == pytest.approx(0.55)
    assert wsd.at(100) == pytest.approx(0.1)


def test_constant_stays() -> None:
    assert rate("constant").at(99) == 1.0


def test_an_open_end_stays_at_the_peak_until_it_is_decided() -> None:
    open_end = rate("cosine", total=None)
    assert open_end.at(10_000) == 1.0
    assert open_end.ending_at(100, 0.2).at(55) == pytest.approx(0.55)
    by_the_clock = rate("wsd", total=None).decaying_from(500, 600)
    assert by_the_clock.at(499) == 1.0
    assert by_the_clock.at(550) == pytest.approx(0.55)
    assert by_the_clock.total_steps == 600


def test_no_warm_up_is_allowed() -> None:
    assert rate("cosine", warmup=0).at(0) == pytest.approx(1.0)


def test_a_warm_up_whose_length_is_found_on_the_way_climbs_on_from_where_it_is() -> None:
    rates = rate("cosine", total=None, warmup=200)
    for step, total in ((5, 100), (5, 2000), (100, 2000)):
        fitted = rates.with_default_warmup(step, total).ending_at(total, 0.2)
        climb = [rates.at(step - 1), *(fitted.at(later) for later in range(step, fitted.warmup_steps))]
        assert all(0 < second - first < 0.25 for first, second in itertools.pairwise(climb))
        assert climb[-1] == pytest.approx(1.0)
    assert rates.with_default_warmup(300, 100_000) == rates


def test_a_held_rate_goes_over_to_the_course_step_by_step() -> None:
    course = LearningRate(
        kind="cosine", peak_lr=1.0, min_lr_ratio=0.1, warmup_steps=10, total_steps=None, decay_start=None
    )
    held = replace(course, held_lr=0.1)
    assert held.at(90) == 0.1
    decided = replace(held.ending_at(200, 0.2), released_at=95)
    whole = course.ending_at(200, 0.2)
    assert decided.at(95) == pytest.approx(0.1 + 0.1 * (whole.at(95) - 0.1))
    steps = [decided.at(step) for step in range(94, 105)]
    assert steps == sorted(steps) and max(later - earlier for earlier, later in itertools.pairwise(steps)) < 0.07
    assert decided.at(104) == whole.at(104) and decided.at(150) == whole.at(150)
