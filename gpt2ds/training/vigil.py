"""A thread on every rank that sees what the main thread cannot while it waits in a collective: a launcher that is gone,
a rank that is gone, a rank that no longer moves. Files in the run folder carry what the ranks say of themselves.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from gpt2ds.processes import is_stopped, machine, start_ticks
from gpt2ds.supervisors import Supervisors
from gpt2ds.training.rank_states import Movement, RankState, RankStates, session_name, silence_of

LOOK_SECONDS = 1.0
HURRIED_SECONDS = 0.1

# A wait that took so much longer than it was to take: this process was stopped itself, and judges nobody by the clock.
STOPPED_SECONDS = 5.0

# A rank that has not written for so long is not the one to tell what happened.
SILENT_SECONDS = 5.0

# A rank that fails by an error of its own says it itself, and its launcher then ends the others.
OTHERS_SPEAK_SECONDS = 5.0
LAST_WORDS_SECONDS = 25.0


@contextlib.contextmanager
def leaving_with_launcher() -> Iterator[None]:
    """While the ranks meet, before there is anything to save: a rank whose launcher has died leaves at once."""
    met = threading.Event()
    supervisors = Supervisors()

    def watch() -> None:
        while not met.wait(LOOK_SECONDS):
            if supervisors.one_is_gone():
                print("The launcher is gone; this rank leaves.", file=sys.stderr, flush=True)
                os._exit(1)

    threading.Thread(target=watch, name="vigil", daemon=True).start()
    try:
        yield
    finally:
        met.set()


class Vigil:
    """Watches over this rank, its launcher and the other ranks while it is entered. See the module's docstring."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        ranks: int,
        *,
        timeout_seconds: float,
        on_launcher_gone: Callable[[], None],
        on_lost: Callable[[str, bool], None],
        grace_seconds: float = 5.0,
        session: str | None = None,
    ) -> None:
        """timeout_seconds: without progress for so long a rank counts as hung; also how long this process may go on
        without its launcher. on_launcher_gone: called once, from the thread, to ask the main thread to save and leave.
        on_lost: called once, from the thread, with the sentence that says which rank is lost, and whether this rank is
        the one to tell it; grace_seconds later the process ends with exit code 1 if the main thread has not left by
        then. session: tells this start from earlier ones in the same folder, the same on all ranks; by default from
        what the launcher put into the environment.
        """
        self.timeout_seconds = timeout_seconds
        self.grace_seconds = grace_seconds
        self._on_launcher_gone = on_launcher_gone
        self._on_lost = on_lost
        self._supervisors = Supervisors()
        self._own = RankState(
            session=session or session_name(),
            launcher=self._supervisors.launcher,
            rank=rank,
            machine=machine(),
            pid=os.getpid(),
            start_ticks=start_ticks(os.getpid()) or 0,
        )
        self._states = RankStates(folder / ".ranks", self._own, ranks)
        self._movement = Movement(laps=0, signs=0, step=-1, doing="starting", at=time.monotonic())
        self._asked = threading.Event()  # the main thread wants to know, soon
        self._left = threading.Event()
        self._found = threading.Event()
        self._lost: str | None = None
        self._failed_elsewhere: str | None = None
        self._thread = threading.Thread(target=self._watch, name="vigil", daemon=True)

    def __enter__(self) -> "Vigil":
        self._states.forget_own()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._left.set()
        self._asked.set()  # wakes the thread up
        self._thread.join(HURRIED_SECONDS * 20)  # not for ever: the disk may not answer
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._states.forget_own()
        else:
            # The others read in it why this rank will be gone.
            self._states.say(self._movement, failed=f"{type(error).__name__}: {error}", lost=self._lost)

    def progress(self, step: int, doing: str) -> None:
        """Says that the main thread moves: at each micro-step, evaluation batch and saved tensor, on every rank alike.

        step: the last one that is complete. doing: for "it was ...", such as "in step 18". Takes about a microsecond.
        """
        earlier = self._movement
        if step == earlier.step:
            self._movement = Movement(earlier.laps, earlier.signs + 1, step, doing, time.monotonic())
        else:
            self._movement = Movement(earlier.laps + 1, 0, step, doing, time.monotonic())

    def lost(self, wait_seconds: float = 3.0) -> str | None:
        """For a main thread whose collective raised: which rank is lost, found out within wait_seconds; else None."""
        self._asked.set()
        self._found.wait(wait_seconds)
        return self._lost or self._failed_elsewhere

    def speaks(self) -> bool:
        """Whether it is for this rank to tell of a lost one: no lower rank lives, or has told it already."""
        now = time.monotonic()
        lower = [other for other in self._states.others() if other.rank < self._own.rank]
        living = (silence_of(rank, now) <= SILENT_SECONDS and not self._states.is_gone(rank) for rank in lower)
        return not any(living) and not any(rank.lost for rank in lower)

    def _watch(self) -> None:
        orphan_since: float | None = None
        while not self._left.is_set():
            now = time.monotonic()
            if orphan_since is None and self._supervisors.one_is_gone():
                orphan_since = now
                with contextlib.suppress(Exception):
                    self._on_launcher_gone()
            self._states.say(self._movement)
            self._states.look(now)
            message = self._who_is_lost(now)
            if orphan_since is not None and now - orphan_since >= self.timeout_seconds:
                message = message or self._overdue()
            if message is not None:
                self._leave(message)
                return
            self._wait()

    def _wait(self) -> None:
        start = time.monotonic()
        if self._asked.is_set():
            self._left.wait(HURRIED_SECONDS)
        else:
            self._asked.wait(LOOK_SECONDS)
        waited = time.monotonic() - start
        if waited > LOOK_SECONDS + STOPPED_SECONDS:
            self._states.forgive(waited)
            self._movement = self._movement.later(waited)

    def _leave(self, message: str) -> None:
        self._lost = message
        self._found.set()
        with contextlib.suppress(Exception):
            self._on_lost(message, self.speaks())
        self._states.say(self._movement, lost=message)
        # With gloo the main thread gets an error and ends by itself; with NCCL it would wait for ever. One that has
        # asked is about to leave, and may have a log to write.
        if self._left.wait(self.grace_seconds) or (self._asked.is_set() and self._left.wait(LAST_WORDS_SECONDS)):
            return
        os._exit(1)

    def _who_is_lost(self, now: float) -> str | None:
        others = self._states.others()
        for other in others:
            if self._states.is_gone(other):
                return f"{other.name} is gone; its last step was {other.last_step}, it was {other.doing}."
        for other in others:
            if other.lost:
                return other.lost  # it found out first, and may have left since
            if other.failed:
                self._failed_elsewhere = f"{other.name} failed: {other.failed}; its last step was {other.last_step}."
                if silence_of(other, now) > OTHERS_SPEAK_SECONDS:
                    return self._failed_elsewhere
        # One that waits for another does not move either: as long as anybody does, nobody hangs.
        moved_at = max(self._movement.at, self._states.others_moved_at)
        return self._who_hangs(now) if now - moved_at >= self.timeout_seconds else None

    def _who_hangs(self, now: float) -> str:
        own = self._own.moved(self._movement)
        known = [own, *self._states.others()]
        since = f"has not moved for {self.timeout_seconds:.0f} s"
        # Whose thread is silent as well was stopped whole, or its machine was.
        limit = min(10.0, self.timeout_seconds / 2)
        silent = [rank for rank in known[1:] if silence_of(rank, now) > limit]
        if silent:
            first = silent[0]
            stopped = first.machine == own.machine and is_stopped(first.pid)
            cure = "a signal stopped it (SIGSTOP, Ctrl-Z)" if stopped else f"look at its machine and at {first.where}"
            return f"{first.name} {since}: it was {first.doing}; {cure}."
        least = min(known, key=lambda rank: rank.position)
        if all(rank.position == least.position for rank in known) and len(known) > 1:
            return f"No rank {since.replace('has not', 'has')}: all were {least.doing}; {least.where} shows where."
        return f"{least.name} {since}: it was {least.doing}; {least.where} shows where."

    def _overdue(self) -> str:
        return (
            f"The launcher is gone, and {self._own.name} has not left within {self.timeout_seconds:.0f} s: "
            f"it was {self._movement.doing}."
        )
