"""One session of a run, from a plan to its end: the ranks, the run folder's lock, who watches, and what is said when
it fails. What happens between two steps is `loop`.
"""

import json
import os
import sys
import threading
import uuid
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from gpt2ds.devices import card_bytes
from gpt2ds.errors import MemoryShortageError, RankLostError, UserError
from gpt2ds.files import not_writable, write_atomically
from gpt2ds.plan import Plan
from gpt2ds.run_folder import OUTCOME, complete_checkpoints
from gpt2ds.run_lock import RunLock
from gpt2ds.runlog.metrics import NullLog, Recorder, RunLog
from gpt2ds.training.engine import Ranks, TrainingEngine, chatter_to, share, start_ranks, stop_ranks
from gpt2ds.training.guard import StopSignals
from gpt2ds.training.loop import Ending, Run
from gpt2ds.training.memory_watch import AllocatorWatch, MemoryWatch
from gpt2ds.training.out_of_memory import explain, is_out_of_memory
from gpt2ds.training.vigil import Vigil, leaving_with_launcher

# A main thread whose collective failed says what it knows within this; one that still waits in it never will.
SPEAK_SECONDS = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a session ended, on every rank."""

    ending: Ending
    step: int
    is_main: bool
    """Whether this process is rank 0, the one that speaks."""
    folder: Path

    @property
    def exit_code(self) -> int:
        """1 when the run failed; one that was interrupted did what it was told."""
        return 1 if self.ending.failed else 0

    def write(self) -> None:
        """The mark that a session came to its end by itself; a launcher's exit code does not say that."""
        content = {
            "reason": self.ending.reason,
            "step": self.step,
            "completed": self.ending.completed,
            "failed": self.ending.failed,
            "exit_code": self.exit_code,
        }
        write_atomically(self.folder / OUTCOME, json.dumps(content).encode())


def train(
    plan: Plan,
    recorder_for: Callable[[Plan], Recorder],
    signals: StopSignals,
    watch: MemoryWatch | None = None,
) -> Outcome:
    """Runs the plan on all ranks together.

    recorder_for: makes rank 0's recorder once the run folder is there. watch: measures this rank's memory; by default
    CUDA's allocator does, and on a CPU nobody. Raises UserError when a resume is not possible, RankLostError when
    another rank died or hangs, and whatever the engine raises; the log then ends with the reason.
    """
    cap = card_bytes(plan.options.gpu_memory) if plan.options.gpu_memory else None
    try:
        with leaving_with_launcher():
            # The vigil speaks at the plan's timeout; a collective that gave up first could not say who is missing.
            ranks = start_ranks(plan.device_kind, memory_cap_bytes=cap, timeout_seconds=2 * plan.rank_timeout_seconds)
            # Folder names carry the time and memory can differ between cards: one plan must count, and it is rank 0's.
            plan = share(plan)
    except Exception as error:
        if answer := _answer(error, plan, int(os.environ["RANK"]), "while starting"):
            raise answer from error
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"Port {os.environ['MASTER_PORT']}, at which the ranks meet, is taken, perhaps by another run: give "
                "the launcher another one (deepspeed --master_port)."
            ) from error
        raise
    with _locked(plan, ranks), closing(_Log(plan, ranks, recorder_for)) as log:
        return _session(plan, ranks, log, signals, watch)


def _locked(plan: Plan, ranks: Ranks) -> RunLock | nullcontext[None]:
    """Rank 0's lock on the run folder; raises UserError on every rank when another run has it."""
    lock, problem = None, None
    if ranks.rank == 0:
        try:
            lock = RunLock.take(plan.folder)
        except UserError as error:
            problem = str(error)
    if problem := share(problem):
        raise UserError(problem)
    return lock or nullcontext()


class _Log:
    """Rank 0's recorder, and who may still speak when a rank is lost: the main thread, or the vigil's if it cannot."""

    def __init__(self, plan: Plan, ranks: Ranks, recorder_for: Callable[[Plan], Recorder]) -> None:
        self.recorder: Recorder = NullLog()
        self._folder = plan.folder
        problem = None
        if ranks.rank == 0:
            try:
                self.recorder = recorder_for(plan)
            except OSError as error:
                problem = not_writable(plan.folder, error)
        if problem := share(problem):
            raise UserError(problem)
        self.run: Run | None = None
        self._spoken = threading.Event()

    def failed(self, reason: str, what: str | None = None, in_place_of_main: bool = False) -> None:
        """Ends the log of a run that failed; the first one to speak counts. in_place_of_main: rank 0 is lost."""
        if self._spoken.is_set():
            return
        self._spoken.set()
        if in_place_of_main and isinstance(self.recorder, NullLog):
            with suppress(OSError):
                self.recorder = RunLog(self._folder)
        step, totals = (self.run.step, self.run.totals()) if self.run else (0, {"tokens": 0, "elapsed_seconds": 0.0})
        with suppress(OSError, ValueError):  # on a full disk the first error is the one to see
            if self.run:
                self.run.compare_memory()
            if what:
                self.recorder.record("incident", step, what=" ".join(what.splitlines()))
            self.recorder.record("end", step, reason=f"failed: {reason}", **totals)

    def rank_lost(self, message: str, speaks: bool) -> None:
        """From the vigil's thread; the process ends soon after."""
        if not self._spoken.wait(SPEAK_SECONDS):
            if speaks:
                print(message, file=sys.stderr, flush=True)
            self.failed("a rank was lost", message, in_place_of_main=speaks)

    def close(self) -> None:
        with suppress(OSError):  # what the disk did not take was said when it was to be written
            self.recorder.close()


def _session(plan: Plan, ranks: Ranks, log: _Log, signals: StopSignals, watch: MemoryWatch | None) -> Outcome:
    if watch is None and plan.device_kind == "cuda":
        watch = AllocatorWatch()
    plan.folder.mkdir(parents=True, exist_ok=True)  # on every machine
    vigil = Vigil(
        plan.folder,
        ranks.rank,
        ranks.world_size,
        timeout_seconds=plan.rank_timeout_seconds,
        on_launcher_gone=signals.launcher_gone,
        on_lost=log.rank_lost,
        session=share(uuid.uuid4().hex),
    )
    with chatter_to(plan.folder / "deepspeed.log") as chatter, watch or nullcontext(), vigil:
        try:
            engine = TrainingEngine(plan, ranks, chatter)
            run = log.run = Run(plan, engine, log.recorder, signals, watch)
            engine.on_progress = lambda: vigil.progress(run.step, run.doing)
            ending = run.end(run.go())
            stop_ranks()
        except UserError:
            raise  # a resume that is refused: the run is as it was
        except BaseException as error:
            if answer := _answer(error, plan, ranks.rank, log.run.doing if log.run else "building the engine"):
                log.failed("out of memory", str(answer))
                raise answer from error
            # A collective fails when another rank has died: that rank is the news, not the collective.
            if isinstance(error, RuntimeError) and (lost := vigil.lost()):
                speaks = vigil.speaks()
                log.failed("a rank was lost", lost, in_place_of_main=speaks)
                raise RankLostError(lost, speaks=speaks) from error
            log.failed(_first_line(error))
            # Without leaving the group in good order: the other ranks may wait in the middle of a collective.
            raise
    return Outcome(ending=ending, step=run.step, is_main=ranks.rank == 0, folder=plan.folder)


def _answer(error: BaseException, plan: Plan, rank: int, doing: str) -> MemoryShortageError | None:
    """What to tell the user when memory ran out; None for any other error."""
    if not is_out_of_memory(error):
        return None
    saved = complete_checkpoints(plan.folder)
    newest = saved[-1].name if saved else None
    return MemoryShortageError(explain(error, plan, rank=rank, doing=doing, checkpoint=newest))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
