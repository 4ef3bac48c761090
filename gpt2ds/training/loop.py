"""The training loop: from a plan to the last checkpoint, read from top to bottom like the run it describes."""

import json
import math
import os
import platform
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gpt2ds import __version__
from gpt2ds.corpus.batches import Batches, Windows
from gpt2ds.devices import card_bytes
from gpt2ds.errors import MemoryShortageError, UserError
from gpt2ds.files import write_atomically
from gpt2ds.options import DEFAULTS
from gpt2ds.plan import Plan, evaluation_interval
from gpt2ds.runlog.metrics import NullLog, Recorder
from gpt2ds.training import checkpoints
from gpt2ds.training.engine import TrainingEngine, chatter_to, gather_numbers, share, start_ranks, stop_ranks
from gpt2ds.training.evaluation import Evaluation, sample_text, to_device
from gpt2ds.training.guard import Clock, Finiteness, StopSignals
from gpt2ds.training.memory_watch import AllocatorWatch, MemoryWatch, StepPeaks
from gpt2ds.training.out_of_memory import explain, is_out_of_memory
from gpt2ds.training.schedule import LearningRate

# Under --hours the number of steps is estimated once so much of the time has gone, but not before so many steps.
ESTIMATE_AFTER_FRACTION = 0.01
ESTIMATE_AFTER_STEPS = 5

# Of the time, kept free for checkpoints in that estimate; what one takes is not known before the first.
CHECKPOINTS_SHARE = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run ended, on every rank."""

    reason: str
    step: int
    completed: bool
    """False when a signal or non-finite steps ended it before its time."""
    failed: bool
    is_main: bool
    """Whether this process is rank 0, the one that speaks."""
    folder: Path


def train(plan: Plan, recorder_for: Callable[[Plan], Recorder], watch: MemoryWatch | None = None) -> Outcome:
    """Runs the plan on all ranks together.

    recorder_for: makes rank 0's recorder once the run folder is there. watch: measures this rank's memory; by default
    CUDA's allocator does, and on a CPU nobody. Raises UserError when a resume is not possible, and whatever the engine
    raises; the log then ends with the reason.
    """
    cap = card_bytes(plan.options.gpu_memory) if plan.options.gpu_memory else None
    try:
        ranks = start_ranks(plan.device_kind, memory_cap_bytes=cap)
        # Folder names carry the time and memory can differ between cards: one plan must count, and it is rank 0's.
        plan = share(plan)
    except Exception as error:
        if answer := _answer(error, plan, int(os.environ["RANK"]), "while starting"):
            raise answer from error
        raise
    if watch is None and plan.device_kind == "cuda":
        watch = AllocatorWatch()
    recorder: Recorder = NullLog()
    plan.folder.mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        recorder = recorder_for(plan)
    chatter_file = plan.folder / "deepspeed.log"
    with closing(recorder), chatter_to(chatter_file) as chatter, StopSignals() as signals, watch or nullcontext():
        run = None
        try:
            run = _Run(plan, TrainingEngine(plan, ranks, chatter), recorder, signals, watch)
            reason, completed, failed = run.go()
        except UserError:
            raise  # a resume that is refused: the run is as it was
        except BaseException as error:
            step, totals = (run.step, run.totals()) if run else (0, {"tokens": 0, "elapsed_seconds": 0.0})
            answer = _answer(error, plan, ranks.rank, run.doing if run else "building the engine")
            with suppress(OSError):  # on a full disk the first error is the one to see
                if run:
                    run.compare_memory()
                if answer:
                    recorder.record("incident", step, what=" ".join(str(answer).splitlines()))
                reason = "out of memory" if answer else _first_line(error)
                recorder.record("end", step, reason=f"failed: {reason}", **totals)
            # Without leaving the group in good order: the other ranks may wait in the middle of a collective.
            if answer:
                raise answer from error
            raise
        run.end_watch()
        run.compare_memory()
        recorder.record("end", run.step, reason=reason, **run.totals())
        stop_ranks()
    return Outcome(
        reason=reason,
        step=run.step,
        completed=completed,
        failed=failed,
        is_main=ranks.rank == 0,
        folder=plan.folder,
    )


def _answer(error: BaseException, plan: Plan, rank: int, doing: str) -> MemoryShortageError | None:
    """What to tell the user when memory ran out; None for any other error."""
    if not is_out_of_memory(error):
        return None
    saved = checkpoints.newest_name(plan.folder / "checkpoints")
    return MemoryShortageError(explain(error, plan, rank=rank, doing=doing, checkpoint=saved))


class _Run:
    """The state of a run between two steps."""

    def __init__(
        self,
        plan: Plan,
        engine: TrainingEngine,
        recorder: Recorder,
        signals: StopSignals,
        watch: MemoryWatch | None,
    ) -> None:
        self.plan = plan
        self.engine = engine
        self.recorder = recorder
        self.signals = signals
        self.watch = watch
        self.peaks = StepPeaks()
        ranks = engine.ranks
        self.batches = Batches(
            Windows(plan.corpus.train, plan.context),
            global_batch=plan.global_batch,
            micro_batch=plan.micro_batch,
            rank=ranks.rank,
            ranks=ranks.world_size,
            seed=plan.options.get("seed"),
        )
        self.evaluation = Evaluation(
            Windows(plan.corpus.val, plan.context),
            count=plan.evaluation_windows,
            micro_batch=plan.options.get("evaluation_micro_batch"),
        )
        self.rate = LearningRate.of(plan.schedule)
        self.evaluate_every = plan.evaluate_every
        self.finiteness = Finiteness()
        self.doing = "starting"
        self.taken = True
        self.step = 0
        self.clock = Clock()
        self.step_seconds: list[float] = []
        self.saved_at_step = -1
        self.saved_at = time.monotonic()
        self.evaluated_at = -1
        self.speed_measured = False
        self.evaluation_seconds = 0.0

    @property
    def sequences_seen(self) -> int:
        """The data position: skipped steps use up their sequences as well."""
        return self.step * self.plan.global_batch

    def totals(self) -> dict[str, Any]:
        """What the run has done so far, over all sessions."""
        return {
            "tokens": self.step * self.plan.tokens_per_step,
            "elapsed_seconds": round(self.clock.elapsed_seconds, 3),
        }

    def go(self) -> tuple[str, bool, bool]:
        """Trains to the end; returns (reason, completed, failed)."""
        self.start()
        if self.step == 0 or self._evaluation_due():
            self.evaluate()
        reason, completed, failed = self.until_end()
        if not failed:
            if self.evaluated_at != self.step and completed:
                self.evaluate()
            if self.saved_at_step != self.step:
                self.save()
        return reason, completed, failed

    def start(self) -> None:
        """Takes up an earlier session's state where there is one, and opens the log."""
        resumed_from = None
        passed_over: list[str] = []
        if self.plan.resumed:
            resumed_from, position = checkpoints.load(self.engine, self.plan.folder / "checkpoints", passed_over.append)
            self.step = self.saved_at_step = position.step
            self.evaluated_at = position.evaluated_at
            self.clock = Clock(position.elapsed_seconds)
            # The schedule goes on as it was decided, unless another one is asked for now.
            if position.schedule == asdict(self.plan.schedule):
                self.rate = LearningRate(**position.learning_rate)
                self.speed_measured = position.speed_measured
                self.evaluate_every = self.plan.options.evaluate_every or position.evaluate_every
        if self.engine.ranks.rank == 0:
            # Only now that nothing can be refused any more: an earlier session's plan stays until then.
            _write_plan(self.plan)
        self.recorder.record(
            "start",
            self.step,
            resumed_from=resumed_from,
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            ranks=self.plan.ranks,
            hardware=self.plan.machine.to_dict(),
            versions=_versions(),
            total_steps=self.rate.total_steps,
            hours=self.plan.schedule.hours,
            notes=list(self.plan.notes),
        )
        for sentence in passed_over:
            self.recorder.record("incident", self.step, what=sentence)

    def until_end(self) -> tuple[str, bool, bool]:
        """Step after step, until the steps, the time or the user's patience are used up."""
        while self.rate.total_steps is None or self.step < self.rate.total_steps:
            received, time_used, save_due = self.one_step()
            if not self.finiteness.saw(self.taken):
                return f"failed: the gradient was not finite in {self.finiteness.in_a_row} steps in a row", False, True
            self.fit_to_time(time_used)
            if received and self.step != self.rate.total_steps:
                return f"interrupted by {signal.Signals(received).name}", False, False
            if time_used >= 1.0:
                return "time budget reached", True, False
            if self._evaluation_due():
                self.evaluate()
            if save_due:
                self.save()
        return "completed", True, False

    def one_step(self) -> tuple[int, float, bool]:
        """One optimizer step; returns what all ranks agree on: (signal or 0, share of the time used, whether to
        save).
        """
        plan, engine, device = self.plan, self.engine, self.engine.ranks.device
        self.doing = f"in step {self.step + 1}"
        start = time.monotonic()
        outside = self.watch.begin_step() if self.watch else 0
        lr = self.rate.at(self.step)
        if plan.model.drop_rate:
            # Dropout as a function of the step: a resumed run drops the same units, and no random state needs saving.
            torch.manual_seed(hash((plan.options.get("seed"), self.step, engine.ranks.rank)) % 2**63)
        loss = torch.zeros((), device=device)
        for number, window in enumerate(self.batches.micro_batches(self.sequences_seen)):
            if number:
                engine.end_micro_step()
            ids, targets = to_device(window, device)
            loss += engine.micro_step(ids, targets)
        grad_norm, self.taken = engine.optimizer_step(lr)
        self.step += 1

        in_use, reserved = engine.memory()
        rows = gather_numbers(
            [
                float(loss) / plan.accumulation,
                self.signals.received,
                in_use,
                -1 if reserved is None else reserved,
                self._time_used(),
                self._save_due(),
                self.watch.end_step() if self.watch else 0,
                outside,
            ],
            device,
        )
        memory, reserved_by_rank, watched, outside_by_rank = (
            [int(row[column]) for row in rows] for column in (2, 3, 6, 7)
        )
        if self.watch:
            held = None if reserved is None else reserved_by_rank
            self.peaks.add(watched, held, outside_by_rank, taken=self.taken)
        seconds = time.monotonic() - start
        self.step_seconds.append(seconds)
        mean_loss = statistics.fmean(row[0] for row in rows)
        speed = plan.tokens_per_step / seconds
        flops = plan.model.flops_per_token(plan.context) * speed
        self.recorder.record(
            "step",
            self.step,
            loss=mean_loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=round(speed, 1),
            step_seconds=round(seconds, 4),
            mfu=round(flops / plan.peak_flops, 4) if plan.peak_flops else None,
            memory_bytes=memory,
            reserved_bytes=reserved_by_rank if reserved is not None else None,
            tensor_bytes=watched if self.watch and plan.device_kind == "cpu" else None,
            skipped_steps=engine.skipped_steps,
            loss_scale=engine.loss_scale,
            **self.totals(),
        )
        if not self.taken:
            culprits = [str(rank) for rank, row in enumerate(rows) if not math.isfinite(row[0])]
            cause = (
                f"the loss of rank {', '.join(culprits)} was not finite" if culprits else "a gradient was not finite"
            )
            self.recorder.record("incident", self.step, what=f"Step {self.step} was left out: {cause}.")
        received = int(max(row[1] for row in rows))
        return received, rows[0][4], rows[0][5] > 0

    def end_watch(self) -> None:
        """What the last evaluation and checkpoint took, of every rank."""
        if self.watch:
            rows = gather_numbers([self.watch.begin_step()], self.engine.ranks.device)
            self.peaks.add_outside([int(row[0]) for row in rows])

    def compare_memory(self) -> None:
        """Predicted beside measured, for the log; an incident when they differ."""
        check = self.peaks.check(self.plan)
        if check is None:
            return
        self.recorder.record("memory", self.step, **check.to_dict())
        if wrong := check.incident():
            self.recorder.record("incident", self.step, what=wrong)

    def _evaluation_due(self) -> bool:
        every = self.evaluate_every
        return bool(every) and self.step % (every or 1) == 0 and self.evaluated_at != self.step

    def _time_used(self) -> float:
        hours = self.plan.schedule.hours
        return self.clock.elapsed_seconds / (hours * 3600) if hours else 0.0

    def _save_due(self) -> float:
        options = self.plan.options
        if options.save_every:
            return float(self.step % options.save_every == 0)
        return float(time.monotonic() - self.saved_at >= options.get("save_minutes") * 60)

    def fit_to_time(self, time_used: float) -> None:
        """Under --hours: turns the time into a number of steps, once, the same on all ranks.

        Warm-up-stable-decay leaves its end open then, and decides it by the clock when the decay is due.
        """
        schedule = self.plan.schedule
        if schedule.hours is None or self.rate.total_steps is not None or len(self.step_seconds) < ESTIMATE_AFTER_STEPS:
            return
        decay_due = schedule.kind == "wsd" and time_used >= 1 - schedule.decay_fraction
        if not decay_due and (self.speed_measured or time_used < ESTIMATE_AFTER_FRACTION):
            return
        seconds, total = share(self._steps_in_time())
        if not self.speed_measured:
            self.speed_measured = True
            self.evaluate_every = self.evaluate_every or evaluation_interval(total)
            if self.plan.options.warmup_steps is None:
                self.rate = self.rate.with_default_warmup(self.step, total)
        reason = f"{seconds:.3g} s a step leave room for so many in {schedule.hours:g} hours"
        if decay_due:
            self.rate = self.rate.decaying_from(self.step, total)
            reason = f"the decay starts at {1 - schedule.decay_fraction:.0%} of {schedule.hours:g} hours"
        elif schedule.kind != "wsd":
            self.rate = self.rate.ending_at(total, schedule.decay_fraction)
        self.recorder.record(
            "schedule", self.step, total_steps=total, warmup_steps=self.rate.warmup_steps, reason=reason
        )

    def _steps_in_time(self) -> tuple[float, int]:
        """(seconds of a step, number of the last step that still ends in time), as rank 0's clock has it."""
        budget = (self.plan.schedule.hours or 0.0) * 3600
        left = budget - self.clock.elapsed_seconds - self.evaluation_seconds  # one evaluation comes after the last step
        if left > self.plan.options.get("save_minutes") * 60:
            left *= 1 - CHECKPOINTS_SHARE
        seconds = statistics.median(self.step_seconds[1:])  # the first step warms caches up
        if self.evaluate_every:
            seconds += self.evaluation_seconds / self.evaluate_every
        else:
            left -= min(left / 2, left / budget * DEFAULTS["evaluations"][0] * self.evaluation_seconds)
        return seconds, self.step + max(1, int(left / seconds))

    def evaluate(self) -> None:
        """Validation loss and a sample of text, by all ranks together."""
        self.doing = f"evaluating at step {self.step}"
        options = self.plan.options
        start = time.monotonic()
        loss = self.evaluation.loss(self.engine)
        seconds = time.monotonic() - start
        self.recorder.record(
            "evaluation", self.step, val_loss=loss, windows=len(self.evaluation.chosen), seconds=round(seconds, 3)
        )
        prompt = options.get("sample_prompt")
        text = sample_text(
            self.engine, prompt, tokens=options.get("sample_tokens"), seed=options.get("seed") + self.step
        )
        self.recorder.record("sample", self.step, prompt=prompt, text=text)
        self.evaluated_at = self.step
        self.evaluation_seconds = time.monotonic() - start

    def save(self) -> None:
        """A checkpoint, by all ranks together."""
        self.doing = f"saving at step {self.step}"
        position = checkpoints.Position(
            step=self.step,
            sequences_seen=self.sequences_seen,
            elapsed_seconds=self.clock.elapsed_seconds,
            skipped_steps=self.engine.skipped_steps,
            learning_rate=asdict(self.rate),
            evaluate_every=self.evaluate_every,
            speed_measured=self.speed_measured,
            schedule=asdict(self.plan.schedule),
            evaluated_at=self.evaluated_at,
        )
        name, size, seconds = checkpoints.save(
            self.engine, self.plan.folder / "checkpoints", position, self.plan.options.get("keep")
        )
        self.recorder.record("checkpoint", self.step, name=name, bytes=size, seconds=round(seconds, 3))
        self.saved_at_step, self.saved_at = self.step, time.monotonic()


def _write_plan(plan: Plan) -> None:
    write_atomically(plan.folder / "plan.json", json.dumps(plan.to_dict(), indent=1).encode())
    write_atomically(plan.folder / "ds_config.json", json.dumps(plan.ds_config(), indent=1).encode())


def _versions() -> dict[str, str]:
    packages = ("torch", "deepspeed", "tiktoken", "numpy")
    return {"gpt2ds": __version__, "python": platform.python_version()} | {name: version(name) for name in packages}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
