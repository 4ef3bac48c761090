"""What the ranks say of themselves in RUN/.ranks/, a small file each, written and read by `vigil` once a second."""

import contextlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from gpt2ds.processes import start_ticks


class Movement(NamedTuple):
    """The main thread's last sign of life."""

    laps: int
    """Changes of the step so far: unlike the step itself, never less than before."""
    signs: int
    """Of life, within this step. From zero at each, since rank 0 saves more tensors than the others."""
    step: int
    doing: str
    at: float
    """time.monotonic() of this process."""

    def later(self, seconds: float) -> "Movement":
        """As if it had happened so much later."""
        return self._replace(at=self.at + seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankState:
    """One rank as its file has it."""

    session: str
    launcher: str
    """Who started it, by pid and start: a session's name alone can come again, with the port."""
    rank: int
    machine: str
    pid: int
    start_ticks: int
    laps: int = -1
    signs: int = 0
    step: int = -1
    doing: str = "starting"
    moved_at: str = ""
    """For the reader of the file; nothing is judged by another machine's clock."""
    beat: int = 0
    """Goes up with every write."""
    failed: str | None = None
    """The error with which its main thread leaves."""
    lost: str | None = None
    """The sentence about the rank that it has lost."""
    seen_at: float = 0.0
    """When its beat was last seen to change, by the reader's time.monotonic(). Not in the file."""

    @property
    def name(self) -> str:
        """Rank and process, as a sentence begins."""
        return f"Rank {self.rank} (process {self.pid})"

    @property
    def last_step(self) -> str:
        """The last step for a sentence."""
        return str(self.step) if self.step >= 0 else "none yet"

    @property
    def position(self) -> tuple[int, int]:
        """Comparable between ranks: the smaller one is behind."""
        return self.laps, self.signs

    @property
    def where(self) -> str:
        """The command that shows where its main thread is."""
        return f"`py-spy dump --pid {self.pid}`"

    def moved(self, movement: Movement) -> "RankState":
        """This rank at that movement."""
        laps, signs, step, doing, _ = movement
        return replace(self, laps=laps, signs=signs, step=step, doing=doing)


def session_name() -> str:
    """Where the ranks of one start meet, and which start of several under torchrun it is."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "GPT2DS_SUPERVISOR")
    return " ".join(os.environ.get(name, "-") for name in names)


def silence_of(rank: RankState, now: float) -> float:
    """Seconds since its file was last seen to change."""
    return now - rank.seen_at


class RankStates:
    """The folder of all ranks' files. A folder that cannot be written hides this rank and stops nothing."""

    def __init__(self, folder: Path, own: RankState, ranks: int) -> None:
        self._folder = folder
        self._own = own
        self._files = {rank: folder / f"rank-{rank:05d}.json" for rank in range(ranks)}
        self._others: dict[int, RankState] = {}
        self._proven: set[int] = set()
        self.others_moved_at = -math.inf
        """When the position of another rank was last seen to change, by time.monotonic()."""
        self._beat = 0

    def forget_own(self) -> None:
        """Removes this rank's file: at the start what an earlier session left, at the end as a goodbye.

        That works on a full disk, where a last word could not be written.
        """
        with contextlib.suppress(OSError):
            self._files[self._own.rank].unlink(missing_ok=True)

    def say(self, movement: Movement, *, failed: str | None = None, lost: str | None = None) -> None:
        """Writes this rank's file."""
        self._beat += 1
        ago = time.monotonic() - movement.at
        moved_at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - ago))
        state = replace(self._own.moved(movement), moved_at=moved_at, beat=self._beat, failed=failed, lost=lost)
        content = {name: value for name, value in asdict(state).items() if name != "seen_at"}
        file = self._files[self._own.rank]
        temporary = file.with_suffix(".writing")
        # Not synced: this is for processes that live now.
        with contextlib.suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(file)

    def look(self, now: float) -> None:
        """Reads the other ranks' files; one that is no longer there has said goodbye."""
        for rank, file in self._files.items():
            if rank == self._own.rank:
                continue
            state, readable = _read(file)
            earlier = self._others.get(rank)
            if state is None:
                if readable:
                    self._others.pop(rank, None)
            elif self._is_of_this_session(state):
                changed = earlier is None or earlier.beat != state.beat
                if earlier is not None and changed:
                    self._proven.add(rank)
                if earlier is not None and earlier.position != state.position:
                    self.others_moved_at = now
                seen_at = now if changed or earlier is None else earlier.seen_at
                self._others[rank] = replace(state, seen_at=seen_at)

    def others(self) -> list[RankState]:
        """Those of this session that have not said goodbye. On another machine only those seen to move at all, since
        nothing else tells their files from an earlier session's.
        """
        return [
            state
            for rank, state in sorted(self._others.items())
            if state.machine == self._own.machine or rank in self._proven
        ]

    def is_gone(self, other: RankState) -> bool:
        """Whether the process has ended, on this machine, without saying goodbye or why."""
        if other.machine != self._own.machine or start_ticks(other.pid) == other.start_ticks:
            return False
        state, readable = _read(self._files[other.rank])  # it may have spoken since it was last read
        return state is not None and readable and state.pid == other.pid and not (state.failed or state.lost)

    def forgive(self, seconds: float) -> None:
        """After a time in which this process was stopped: nobody was silent then."""
        self.others_moved_at += seconds
        self._others = {rank: replace(state, seen_at=state.seen_at + seconds) for rank, state in self._others.items()}

    def _is_of_this_session(self, state: RankState) -> bool:
        here = state.machine == self._own.machine
        return state.session == self._own.session and (not here or state.launcher == self._own.launcher)


def _read(file: Path) -> tuple[RankState | None, bool]:
    """(the state, or None where there is none; whether that is certain)."""
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        names = {known.name for known in fields(RankState)}
        return RankState(**{name: value for name, value in content.items() if name in names}), True
    except FileNotFoundError:
        return None, True
    except (OSError, ValueError, TypeError, AttributeError):
        return None, False
