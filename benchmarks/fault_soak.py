"""Kills and signals training runs at random moments and holds what is left against an unbroken run.

    python benchmarks/fault_soak.py --kills 50 --seed 1 [--signals 20]

Two CPU ranks, ZeRO-2, fp32. kill -9 of one rank, all ranks, the launcher, in turn, at least a third of them inside a
save and none before step 1; after each one --resume, and at the end every loss and every byte of the last checkpoint as
in the unbroken run. Then SIGTERM, some SIGINT, SIGHUP, SIGUSR1, and SIGTERM to the `deepspeed` program. About half a
minute for each. The result is written after every event; with --kills 0 or --signals 0 the other part of it stays.
"""

import argparse
import json
import platform
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drawn_faults import Kill, Signalled, kill_once, kills_summary, signal_once, signals_summary
from drawn_moments import draw_kill_moment, draw_signal_moment, draw_victim, usual_seconds
from killed_runs import BrokenPromiseError, Chain, Shape, lay_out, unbroken

from gpt2ds.devices import this_machine

RESULT = Path(__file__).parent / "results" / "fault_soak.json"

KILLED = Shape(steps=50, accumulation=2, save_every=5)
SIGNALLED = Shape(steps=20, accumulation=64, save_every=3)

# Beside the SIGTERMs.
OTHER_SIGNALS = (
    *((signal.SIGINT, "train", False), (signal.SIGHUP, "train", False)) * 2,
    *[(signal.SIGTERM, "train", True)] * 2,
    *[(signal.SIGTERM, "deepspeed", False)] * 3,
)


class Soak:
    """One part of it: the events so far, and what went wrong."""

    def __init__(self, part: str, root: Path, seed: int, out: Path) -> None:
        self.part = part
        self.root = root
        self.seed = seed
        self.out = out
        self.draw = random.Random(seed)
        self.kills: list[Kill] = []
        self.signals: list[Signalled] = []
        self.failures: list[str] = []
        self.runs_compared = 0
        self._start = time.monotonic()

    def many(self, shape: Shape, events: list[Any], one: Callable[[Chain, Any, dict[str, float]], Any]) -> None:
        """Each event on a chain of this shape; where a chain ends before, the event is drawn again on a new one."""
        whole, markers = unbroken(self.root / f"unbroken-{shape.accumulation}", self.root, shape)
        usual = usual_seconds(markers)
        left, number = list(events), 0
        while left:
            number += 1
            chain = Chain(self.root / f"broken-{shape.accumulation}-{number}", self.root, shape)
            try:
                while left and one(chain, left[0], usual):
                    left.pop(0)
                    self.write()
                if not left:
                    with chain.start("ranks") as session:
                        session.until_over()
                chain.same_as(whole)
                self.runs_compared += 1
                shutil.rmtree(chain.folder)
            except (BrokenPromiseError, OSError, IndexError, KeyError) as error:
                self.failures.append(f"{chain.folder.name}, {left[:1]}: {type(error).__name__}: {error}"[:4000])
                left = left[1:]
            self.write()

    def kill(self, chain: Chain, turn: int, usual: dict[str, float]) -> bool:
        """One kill; False when the run came to its end before."""
        kill = kill_once(chain, draw_victim(self.draw, turn), draw_kill_moment(self.draw, chain), usual)
        self.kills += [kill] if kill else []
        return kill is not None

    def signal(self, chain: Chain, event: tuple[signal.Signals, str, bool], usual: dict[str, float]) -> bool:
        """One signal; False when the run came to its end before."""
        number, how, save_first = event
        moment = draw_signal_moment(self.draw, chain)
        signalled = signal_once(chain, number, how, moment, usual, save_first=save_first)
        self.signals += [signalled] if signalled else []
        return signalled is not None

    def write(self) -> None:
        """The result so far, beside the other part's."""
        machine = this_machine()
        result: dict[str, Any] = json.loads(self.out.read_text(encoding="utf-8")) if self.out.exists() else {}
        result |= {
            "what": "kill -9 and signals at random moments of two-rank ZeRO-2 runs in fp32, each resumed to its end",
            "machine": {"cpu": machine.cpu_name, "cores": machine.cores},
            "python": platform.python_version(),
        }
        result[self.part] = {
            "seed": self.seed,
            "minutes": round((time.monotonic() - self._start) / 60, 1),
            "failures": self.failures,
            "runs_compared": self.runs_compared,
        } | (kills_summary(self.kills) if self.part == "kills" else signals_summary(self.signals))
        self.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signals", type=int, default=20, help="SIGTERMs; 0 leaves the other signals out as well")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="fault_soak-"))
    lay_out(root)
    kills, signals = (Soak(part, root, arguments.seed, arguments.out) for part in ("kills", "signals"))
    if arguments.kills:
        kills.many(KILLED, list(range(arguments.kills)), kills.kill)
    if arguments.signals:
        events = [(signal.SIGTERM, "train", False)] * arguments.signals + list(OTHER_SIGNALS)
        signals.draw.shuffle(events)
        signals.many(SIGNALLED, events, signals.signal)
    failures = kills.failures + signals.failures
    print(f"{len(kills.kills)} kills, {len(signals.signals)} signals, {len(failures)} failures: {arguments.out}")
    if failures:
        print("\n\n".join([*failures, f"What they left is in {root}."]))
        raise SystemExit(1)
    if any(kill.step < 1 for kill in kills.kills):
        raise SystemExit("A kill came before step 1.")
    if 3 * sum(kill.in_save for kill in kills.kills) < len(kills.kills):
        raise SystemExit("Fewer than a third of the kills met a save: take another seed.")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
