"""A seeded handful of what benchmarks/fault_soak.py does fifty times: kill -9 and signals, and nothing of the run lost
but the steps since its last checkpoint.
"""

import random
import signal
from pathlib import Path

import pytest
from support import load_benchmark

runs = load_benchmark("killed_runs")
faults = load_benchmark("drawn_faults")

SEED = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("kills") / "root"
    runs.lay_out(folder)
    return folder


def test_a_run_that_is_killed_and_signalled_goes_on_as_if_nothing_had_happened(root: Path) -> None:
    shape = runs.Shape(steps=7, accumulation=64, save_every=2)
    whole, markers = runs.unbroken(root / "whole", root, shape)
    usual = faults.usual_seconds(markers)
    draw = random.Random(SEED)
    chain = runs.Chain(root / "broken", root, shape)

    # Asked for a checkpoint in its first step it saves and goes on; then it leaves the second one in the middle.
    early = faults.Moment("micro", draw.randint(5, 50), 0.0)
    left = faults.signal_once(chain, signal.SIGTERM, "train", early, usual, save_first=True)
    assert left.in_window and left.step == 1, left

    one_rank = faults.Victim(f"rank {draw.randrange(2)}", "ranks")
    later = faults.Moment("step", draw.randint(1, 2), draw.random())
    kills = [
        faults.kill_once(chain, one_rank, later, usual),
        faults.kill_once(chain, faults.Victim("all ranks", "ranks"), in_save(draw), usual),
        faults.kill_once(chain, faults.Victim("launcher", "train"), in_save(draw), usual),
    ]
    assert all(kills)
    assert sum(kill.in_save for kill in kills) >= 2, kills
    hung_up = faults.signal_once(chain, signal.SIGHUP, "ranks", in_save(draw), usual)
    assert hung_up.step % 2 == 0, hung_up

    with chain.start("ranks") as session:
        session.until_over()
    chain.same_as(whole)


def in_save(draw: random.Random) -> tuple[str, int, float]:
    """In the first half of some part of the next save, before it is complete."""
    phase = draw.choice(("begun", "states", "weights"))
    moment: tuple[str, int, float] = faults.Moment(phase, 1, draw.random() / 2)
    return moment
