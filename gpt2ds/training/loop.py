"""The training loop: from the first step to the last checkpoint, read from top to bottom like the run it describes."""

import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gpt2ds import __version__
from gpt2ds.corpus.batches import Batches, Windows
from gpt2ds.errors import UserError
from gpt2ds.plan import Plan, evaluation_interval
from gpt2ds.run_folder import write_plan
from gpt2ds.runlog.metrics import Recorder
from gpt2ds.training import checkpoints, restoring
from gpt2ds.training.agreement import RankStep, StepSeen, agree_on
from gpt2ds.training.data_position import DataPosition
from gpt2ds.training.diagnosis import diagnose
from gpt2ds.training.engine import TrainingEngine, gather_numbers, share
from gpt2ds.training.evaluation import Evaluation, sample_text, to_device
from gpt2ds.training.guard import Clock, StopSignals, name_of
from gpt2ds.training.health import LEAD_STEPS, RETURNS_MOST, Health
from gpt2ds.training.manifest import Manifest, Position
from gpt2ds.training.memory_watch import MemoryWatch, StepPeaks
from gpt2ds.training.saving import Saving
from gpt2ds.training.schedule import LearningRate
from gpt2ds.training.time_budget import TimeBudget


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a run ended."""

    reason: str
    completed: bool = False
    """False when a signal or something that went wrong ended it before its time."""
    failed: bool = False
    weights_good: bool = True
    """False when what the run would save is what went wrong."""


class Run:
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
        self.signals = signals
        self.stop_agreed = 0
        self.watch = watch
        self.peaks = StepPeaks()
        self._recorder = recorder
        self._log_error: OSError | None = None
        self.checkpoints = plan.folder / "checkpoints"
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
        self.health = Health()
        self.budget = TimeBudget(plan)
        self.clock = Clock()
        self.doing = "starting"
        self.step = 0
        self.data = DataPosition(plan.global_batch)
        self.returns = 0
        self.returns_without_progress = 0
        self.trouble_at = 0
        self.save_owed = False
        self.grace_said = False
        self.saving = Saving(plan.options)
        self.evaluated_at = -1
        self.val_loss: float | None = None
        self.speed_measured = False

    def record(self, kind: str, **fields: Any) -> None:
        """One line of the log. A log that cannot be written is remembered: all ranks stop together at the next step."""
        try:
            self._recorder.record(kind, self.step, **fields)
        except OSError as error:
            self._log_error = error

    def totals(self) -> dict[str, Any]:
        """What the run has done so far, over all sessions."""
        return {
            "tokens": self.step * self.plan.tokens_per_step,
            "elapsed_seconds": round(self.clock.elapsed_seconds, 3),
        }

    def go(self) -> Ending:
        """Trains to the end."""
        self.start()
        if self.step == 0 or self._evaluation_due():
            self.evaluate()
        ending = self.until_end()
        if not ending.weights_good:
            return ending
        if self.evaluated_at != self.step and ending.completed:
            self.evaluate()
        if self.saving.at_step != self.step and not self.save():
            why = ending.reason.removeprefix("failed: ")
            return Ending(reason=f"failed: {why}, but the last checkpoint could not be written", failed=True)
        return ending

    def start(self) -> None:
        """Takes up an earlier session's state where there is one, and opens the log."""
        resumed_from = None
        passed_over: list[str] = []
        if self.plan.resumed:
            resumed_from, manifest = restoring.load(self.engine, self.checkpoints, passed_over.append)
            self._go_on_from(manifest.position)
            self.health = Health(manifest.position.losses)
            self.clock = Clock(manifest.position.elapsed_seconds)
            self._take_schedule(resumed_from, manifest)
        # Only now that nothing can be refused any more: an earlier session's plan stays until then.
        if problem := share(write_plan(self.plan) if self.engine.ranks.rank == 0 else None):
            raise UserError(problem)
        self.record(
            "start",
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
            self.record("incident", what=sentence)

    def _take_schedule(self, name: str, manifest: Manifest) -> None:
        """The schedule goes on as it was decided, unless another one is asked for now, or other ranks can do another
        number of steps in --hours. Warm-up-stable-decay goes by the clock in any case.
        """
        position, hours = manifest.position, self.plan.schedule.hours
        same = position.schedule == asdict(self.plan.schedule)
        if not same and self.budget.used(position.elapsed_seconds) >= 1:
            raise UserError(
                f"The run has trained for {position.elapsed_seconds / 3600:.3g} hours already, and --hours {hours:g} "
                "counts those of all its sessions: give it more of them, or --steps."
            )
        try:
            earlier = LearningRate(**position.learning_rate)
        except TypeError as error:
            raise UserError(
                f"Checkpoint {name} was written by another version ({error}): resume it with that one."
            ) from error
        if same and (not hours or manifest.ranks == self.plan.ranks or earlier.kind == "wsd"):
            self.rate = earlier
            self.speed_measured = position.speed_measured
            self.evaluate_every = self.plan.options.evaluate_every or position.evaluate_every
        elif hours:
            # Until the new number of steps is known; the peak, without a warm-up, would undo what was learnt.
            # The warm-up is the one that was, unless another one is asked for.
            own = {name: getattr(earlier, name) for name in ("warmup_steps", "climb_start", "climb_start_lr")}
            own = own if self.plan.options.warmup_steps is None else {}
            self.rate = replace(self.rate, held_lr=earlier.at(position.step), **own)

    def _go_on_from(self, position: Position) -> None:
        self.step = self.saving.at_step = position.step
        self.data = DataPosition(self.plan.global_batch, position.sequences_seen, position.passed_over)
        self.returns = position.returns
        self.evaluated_at = position.evaluated_at
        self.val_loss = position.val_loss

    def until_end(self) -> Ending:
        """Step after step, until the steps, the time or the user's patience are used up."""
        if self.budget.used(self.clock.earlier_seconds) >= 1.0:
            return Ending(reason="time budget reached", completed=True)
        while self.rate.total_steps is None or self.step < self.rate.total_steps:
            seen = self.one_step()
            if seen is None:
                return self._interrupted()
            if seen.log_lost:
                return Ending(reason=f"failed: {self._log_lost()}", failed=True)
            if trouble := self.health.saw(seen.loss, seen.taken):
                if ending := self.go_back(trouble):
                    return ending
                continue
            self.fit_to_time(seen.time_used)
            if seen.stop and self.step != self.rate.total_steps:
                return self._interrupted()
            if seen.time_used >= 1.0:
                return Ending(reason="time budget reached", completed=True)
            if self._evaluation_due():
                self.evaluate()
            self.save_owed |= seen.save_due or self._best_can_be_saved()
            # Not in the middle of trouble: good checkpoints would be pruned for ones to which no run should go back.
            if self.save_owed and not self.health.steps_in_trouble:
                self.save()
        return Ending(reason="completed", completed=True)

    def _interrupted(self) -> Ending:
        return Ending(reason=name_of(self.stop_agreed))

    def one_step(self) -> StepSeen | None:
        """One optimizer step; None when a stop was asked for in the middle of it, and its data waits for the resume."""
        plan, engine, device = self.plan, self.engine, self.engine.ranks.device
        self.doing = f"in step {self.step + 1}"
        start = time.monotonic()
        outside = self.watch.begin_step() if self.watch else 0
        lr = self.rate.at(self.step)
        if plan.model.drop_rate:
            # Dropout as a function of the step: a resumed run drops the same units, and no random state needs saving.
            torch.manual_seed(hash((plan.options.get("seed"), self.step, engine.ranks.rank)) % 2**63)
        loss = torch.zeros((), device=device)
        for number, window in enumerate(self.batches.micro_batches(self.data.next_step())):
            if number:
                # One step of half a million tokens can take 40 s on one card: too long for who waits for the end.
                (self.stop_agreed,) = engine.ranks.agree(self.signals.received)
                if self.stop_agreed:
                    return None
                engine.end_micro_step()
            ids, targets = to_device(window, device)
            loss += engine.micro_step(ids, targets)
        grad_norm, taken = engine.optimizer_step(lr)
        self.step += 1
        self.data.advance()

        in_use, reserved = engine.memory()
        own = RankStep(
            loss=float(loss) / plan.accumulation,
            stop=self.signals.received,
            in_use_bytes=in_use,
            reserved_bytes=-1 if reserved is None else reserved,
            watched_bytes=self.watch.end_step() if self.watch else 0,
            outside_bytes=outside,
            time_used=self.budget.used(self.clock.elapsed_seconds),
            save_due=self._save_due(),
            log_lost=self._log_error is not None,
        )
        seen = agree_on(own, taken=taken, device=device)
        self.stop_agreed = seen.stop
        watched = seen.sizes("watched_bytes")
        if self.watch:
            self.peaks.add(watched, seen.reserved_bytes, seen.sizes("outside_bytes"), taken=taken)
        seconds = time.monotonic() - start
        self.budget.step_seconds.append(seconds)
        speed = plan.tokens_per_step / seconds
        flops = plan.model.flops_per_token(plan.context) * speed
        self.record(
            "step",
            loss=seen.loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=round(speed, 1),
            step_seconds=round(seconds, 4),
            mfu=round(flops / plan.peak_flops, 4) if plan.peak_flops else None,
            memory_bytes=seen.sizes("in_use_bytes"),
            reserved_bytes=seen.reserved_bytes,
            tensor_bytes=watched if self.watch and plan.device_kind == "cpu" else None,
            skipped_steps=engine.skipped_steps,
            loss_scale=engine.loss_scale,
            **self.totals(),
        )
        if not taken:
            self.record("incident", what=f"Step {self.step} was left out: {seen.why_left_out()}.")
        return seen

    def go_back(self, trouble: str) -> Ending | None:
        """To the last checkpoint before the trouble, passing over the data that did it; an ending when that is no use.

        Called by all ranks together.
        """
        last = self.step
        first = last - self.health.steps_in_trouble + 1
        lr = self.rate.at(first - 1)
        suspect = max(1, first - LEAD_STEPS)
        began, _ = self.data.of_steps(self.health.steps_in_trouble)
        guilty = self.data.of_steps(last - suspect + 1)
        known = self.data.passed_over
        self.doing = f"going back before step {first}"
        ending = Ending(
            reason=f"failed: {trouble[0].lower()}{trouble[1:].rstrip('.')}", failed=True, weights_good=False
        )
        passed_over: list[str] = []
        found, why = None, f"{RETURNS_MOST} returns did not help"
        if self.returns_without_progress < RETURNS_MOST:
            for before in (suspect, first):
                found = found or restoring.load_before(self.engine, self.checkpoints, passed_over.append, before)
            why = "there is no checkpoint to go back to"
        for sentence in dict.fromkeys(passed_over):
            self.record("incident", what=sentence)
        if found is None:
            self.record("incident", what=f"{trouble} The run ends, because {why}.")
            self.diagnose(began, lr)
            return ending
        name, manifest = found
        returns = self.returns + 1
        self._go_on_from(manifest.position)
        self.returns = returns
        # Also what earlier returns passed over: a full disk may have kept it from this checkpoint.
        for span in (*known, guilty):
            self.data.pass_over(*span)
        self.returns_without_progress += 1
        self.trouble_at = max(self.trouble_at, last)
        self.health.forget_trouble()
        self.record("return", resumed_from=name, from_step=last)
        self.record(
            "incident",
            what=f"{trouble} The run went back from step {last} to {name} and passes over the sequences of steps "
            f"{max(suspect, self.step + 1)} to {last}.",
        )
        # It learns what is passed over, also when the run is stopped now.
        position = replace(manifest.position, passed_over=self.data.passed_over, returns=returns)
        try:
            checkpoints.amend(self.engine, self.checkpoints, position)
        except checkpoints.SaveError as error:
            self.saving.at_step = -1  # the end of the run tries it once more, as a whole checkpoint
            self.record("incident", what=f"{name} does not know of this return yet: {error}.")
        return None

    def diagnose(self, sequences_seen: int, lr: float) -> None:
        """What went wrong, for the log; the engine is of no use afterwards."""
        self.doing = "looking for the first tensor that is not finite"
        diagnosis = diagnose(self.engine, self.batches.micro_batches(sequences_seen), lr)
        self.record("diagnosis", **diagnosis.to_dict())
        self.record("incident", what=diagnosis.sentence())

    def end(self, ending: Ending) -> Ending:
        """The last words of the log; a run that could not write them has failed."""
        self.end_watch()
        self.compare_memory()
        self.record("end", reason=ending.reason, **self.totals())
        if self._log_error and not ending.failed:
            reason = f"failed: {ending.reason}, but {self._log_lost()}"
            return Ending(reason=reason, completed=ending.completed, failed=True)
        return ending

    def _log_lost(self) -> str:
        # Only rank 0 knows why, and speaks.
        return f"the log cannot be written ({self._log_error.strerror if self._log_error else 'on rank 0'})"

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
        self.record("memory", **check.to_dict())
        if wrong := check.incident():
            self.record("incident", what=wrong)

    def _evaluation_due(self) -> bool:
        every = self.evaluate_every
        due = bool(every) and self.step % (every or 1) == 0
        # The last weights as well, before they are saved: their loss belongs to their checkpoint.
        return (due or self.step == self.rate.total_steps) and self.evaluated_at != self.step

    def _save_due(self) -> bool:
        return self.signals.save_wanted or self.saving.due(self.step)

    def _best_can_be_saved(self) -> bool:
        if self.evaluated_at != self.step or not self.saving.is_best(self.val_loss):
            return False
        return bool(share(self.saving.is_cheap()))  # rank 0's clock decides for all

    def fit_to_time(self, time_used: float) -> None:
        """Under --hours: turns the time into a number of steps, once, the same on all ranks.

        Warm-up-stable-decay leaves its end open then, and decides it by the clock when the decay is due.
        """
        schedule = self.plan.schedule
        if schedule.hours is None or self.rate.total_steps is not None:
            return
        decay_due = self.budget.decay_due(time_used)
        if not decay_due and (self.speed_measured or not self.budget.estimate_due(time_used)):
            return
        seconds, left = share(self.budget.steps_left(self.clock.elapsed_seconds, self.evaluate_every))
        total = self.step + left
        if not self.speed_measured:
            self.speed_measured = True
            self.evaluate_every = self.evaluate_every or evaluation_interval(total)
            if self.rate.held_lr is not None:
                self.rate = replace(self.rate, released_at=self.step)
            elif self.plan.options.warmup_steps is None:
                self.rate = self.rate.with_default_warmup(self.step, total)
        reason = f"{seconds:.3g} s a step leave room for so many in {schedule.hours:g} hours"
        if decay_due:
            self.rate = self.rate.decaying_from(self.step, total)
            reason = f"the decay starts at {1 - schedule.decay_fraction:.0%} of {schedule.hours:g} hours"
        elif schedule.kind != "wsd":
            self.rate = self.rate.ending_at(total, schedule.decay_fraction)
        self.record("schedule", total_steps=total, warmup_steps=self.rate.warmup_steps, reason=reason)

    def evaluate(self) -> None:
        """Validation loss and a sample of text, by all ranks together."""
        self.doing = f"evaluating at step {self.step}"
        options = self.plan.options
        start = time.monotonic()
        loss = self.evaluation.loss(self.engine)
        seconds = time.monotonic() - start
        self.record("evaluation", val_loss=loss, windows=len(self.evaluation.chosen), seconds=round(seconds, 3))
        prompt = options.get("sample_prompt")
        text = sample_text(
            self.engine, prompt, tokens=options.get("sample_tokens"), seed=options.get("seed") + self.step
        )
        self.record("sample", prompt=prompt, text=text)
        self.evaluated_at, self.val_loss = self.step, loss
        self.budget.evaluation_seconds = time.monotonic() - start

    def save(self) -> bool:
        """A checkpoint, by all ranks together; False when it could not be written, and the earlier ones stay."""
        self.doing = f"saving at step {self.step}"
        self.signals.save_wanted = self.save_owed = False
        position = Position(
            step=self.step,
            sequences_seen=self.data.sequences_seen,
            passed_over=self.data.passed_over,
            elapsed_seconds=self.clock.elapsed_seconds,
            skipped_steps=self.engine.skipped_steps,
            returns=self.returns,
            learning_rate=asdict(self.rate),
            evaluate_every=self.evaluate_every,
            speed_measured=self.speed_measured,
            schedule=asdict(self.plan.schedule),
            evaluated_at=self.evaluated_at,
            val_loss=self.val_loss if self.evaluated_at == self.step else None,
            losses=self.health.losses,
        )
        # In the middle of trouble nothing is removed: the checkpoint before it may be the last good one.
        keep = None if self.health.steps_in_trouble else self.plan.options.get("keep")
        try:
            name, size, seconds = checkpoints.save(self.engine, self.checkpoints, position, keep, _versions())
        except checkpoints.SaveError as error:
            self.saving.failed()
            self.record(
                "incident",
                what=f"The checkpoint of step {self.step} could not be written: {error}. The earlier ones are as they "
                "were; training goes on, and the next one is tried when it is due.",
            )
            return False
        self.record("checkpoint", name=name, bytes=size, seconds=round(seconds, 3))
        self.saving.saved(self.step, seconds, position.val_loss)
        # What cannot be left in the middle: a micro-batch, or an evaluation.
        slowest = max(self.budget.step_seconds[1:], default=0.0) / self.plan.accumulation  # the first one compiles
        problem = self.saving.grace_problem(max(slowest, self.budget.evaluation_seconds))
        if problem and not self.grace_said:
            self.grace_said = True
            self.record("incident", what=problem)
        if self.step > self.trouble_at:
            self.returns_without_progress = 0
        return True


def _versions() -> dict[str, str]:
    packages = ("torch", "deepspeed", "tiktoken", "numpy")
    return {"gpt2ds": __version__, "python": platform.python_version()} | {name: version(name) for name in packages}
