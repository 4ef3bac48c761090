"""A seeded handful of what benchmarks/fault_soak.py does fifty times: kill -9 and signals, and nothing of the run lost
but the steps since its last checkpoint.
"""

import random
import signal
from pathlib import Path
from typing import Any

import pytest
from support import load_benchmark
from warm import WarmPython

runs = load_benchmark("killed_runs")
faults = load_benchmark("drawn_faults")
moments = load_benchmark("drawn_moments")

SEED = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("kills") / "root"
    runs.lay_out(folder)
    return folder


def test_a_run_that_is_killed_and_signalled_goes_on_as_if_nothing_had_happened(root: Path) -> None:
    shape = runs.Shape(steps=10, accumulation=16, save_every=2)
    draw = random.Random(SEED)
    whole, chain = (runs.Chain(root / name, root, shape, WarmPython) for name in ("whole", "broken"))
    with whole.start("ranks") as unbroken:  # at the same time: much of a start is waiting
        events = broken(chain, draw)
        unbroken.until_over()
    left, one_rank, all_ranks, hung_up, launcher = events
    kills = [one_rank, all_ranks, launcher]
    assert left.in_window and left.step == 1, left
    assert sum(kill.in_save for kill in kills) >= 1, kills
    assert min(kill.step for kill in kills) >= 1, kills
    assert hung_up.signal == "SIGHUP" and hung_up.step % 2 == 0, hung_up

    with chain.start("ranks") as session:
        session.until_over()
    chain.same_as(whole)


def broken(chain: Any, draw: random.Random) -> list[Any]:
    """What happened to it: signals and kills, none of which the run may outrun."""

    def killed(name: str, how: str, *moment: Any) -> Any:
        return faults.kill_once(chain, moments.Victim(name, how), moments.Moment(*moment), {})

    def signalled(number: signal.Signals, how: str, *moment: Any, save_first: bool = False) -> Any:
        return faults.signal_once(chain, number, how, moments.Moment(*moment), {}, save_first=save_first)

    phases = ("begun", "states", "weights")
    events = [
        # Asked for a checkpoint in its first step it saves and goes on; then it leaves the second one in the middle.
        signalled(signal.SIGTERM, "ranks", "micro", draw.randint(3, 14), 0.0, save_first=True),
        killed(f"rank {draw.randrange(2)}", "ranks", "step", 1, draw.random()),
        killed("all ranks", "ranks", draw.choice(phases), 1, draw.random()),
        signalled(signal.SIGHUP, "ranks", draw.choice(phases), 1, draw.random()),
        # The ranks notice it within a second or so, and train on until then.
        killed("launcher", "train", "step", 1, draw.random()),
    ]
    assert all(events), f"the run came to its end before: {events}"
    return events
