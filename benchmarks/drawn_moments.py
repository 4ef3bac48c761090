"""Moments and victims drawn from a seed, in terms of the markers that a run's ranks write. See killed_runs.py."""

import random
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from killed_runs import RANKS, Chain, Marked

SAVE_PHASES = ("begun", "states", "weights", "manifest", "name", "prune")
SAVING_SHARE = 0.55
LOADING_SHARE = 0.1


class Moment(NamedTuple):
    """When: the n-th marker of a kind that rank 0 writes in a session, and a fraction of the time to the next one."""

    kind: str
    nth: int
    fraction: float


class Victim(NamedTuple):
    """Whom, in a run started how."""

    name: str
    how: str


def kind_of(mark: Marked) -> str:
    """ "step 5 done" is a "step", "save 5: states" are "states", "save 5 begun" is "begun"."""
    words = mark.words.split()
    return words[0] if words[0] in ("step", "micro", "load") else words[-1]


def usual_seconds(markers: Iterable[Marked]) -> dict[str, float]:
    """How long each kind of marker usually waits for the next one, by the markers of an unbroken run."""
    marks = [mark for mark in markers if kind_of(mark) != "micro"]
    gaps: dict[str, list[float]] = {}
    for mark, following in pairwise(marks):
        if mark.words.startswith(("step", "save")) and not following.words.startswith("exit"):
            gaps.setdefault(kind_of(mark), []).append(following.at - mark.at)
    return {kind: sum(seconds) / len(seconds) for kind, seconds in gaps.items()}


def draw_kill_moment(draw: random.Random, chain: Chain) -> Moment:
    """More than half of them inside a save; some in the middle of loading, where there is something to load."""
    share = draw.random()
    if share < SAVING_SHARE:
        return Moment(draw.choice(SAVE_PHASES), draw.choice((1, 1, 2)), draw.random())
    if share < SAVING_SHARE + LOADING_SHARE and chain.newest():
        return Moment("load", 1, draw.random())
    return Moment("step", draw.randint(1, chain.shape.save_every + 2), draw.random())


def draw_signal_moment(draw: random.Random, chain: Chain) -> Moment:
    """Three quarters at any micro-batch of the first steps, the others inside a save."""
    if draw.random() < 0.75:
        return Moment("micro", draw.randint(1, 2 * chain.shape.accumulation), draw.random())
    return Moment(draw.choice(SAVE_PHASES), 1, draw.random())


def draw_victim(draw: random.Random, turn: int) -> Victim:
    """One rank, all ranks, the launcher, in turn."""
    if turn % 3 == 2:
        return Victim(draw.choice(("launcher", "gpt2ds train")), "train")
    name = "all ranks" if turn % 3 else f"rank {draw.randrange(RANKS)}"
    return Victim(name, draw.choice(("train", "ranks")))
