"""Kills and signals at given moments, and what must hold after each one. See killed_runs.py."""

import json
import os
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from typing import Any

from drawn_moments import Moment, Victim, kind_of
from killed_runs import GRACE_SECONDS, RANKS, START_SECONDS, Chain, Marked, Session, must

from gpt2ds.training.manifest import verify

# After the signal a rank ends the micro-batch that it is in, and one more where the other rank had gone on by then.
MICRO_BATCHES_MOST = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """One kill -9 and what came of it."""

    killed: str
    how: str
    step: int
    moment: str
    """The last marker of rank 0 before it."""
    in_save: bool
    steps_lost: int
    survivors_left_seconds: float
    resumed_from: str | None
    """What the run can go on from; None where none was complete, and --resume was refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Signalled:
    """One signal that ended a session, and what came of it."""

    signal: str
    how: str
    step: int
    moment: str
    in_save: bool
    saved_before: bool
    """Whether a SIGUSR1 had come before it, and the run had saved and gone on."""
    in_window: bool
    """Whether it came in the middle of a step, which was left."""
    micro_batches_after: list[int]
    """Of each rank after the signal had reached it."""
    ranks_left_seconds: float


def kill_once(chain: Chain, victim: Victim, moment: Moment, usual: dict[str, float]) -> Kill | None:
    """Starts or resumes the run, kills at that moment, waits until nothing of it lives, and looks at what is left.

    None when the run came to its end before. Raises BrokenPromiseError.
    """
    with chain.start(victim.how) as session:
        if not _await(session, moment, usual):
            session.until_over()
            _went_on_from_the_newest(session)
            return None
        for pid in _doomed(session, victim):
            os.kill(pid, signal.SIGKILL)
        at = time.monotonic()
        seconds = session.until_gone(at)
        if _outcome(chain).get("completed"):
            return None
        must(any(session.exit_codes()), f"exit codes {session.exit_codes()}\n{session.output}")
        _went_on_from_the_newest(session)
    _all_are_whole(chain)
    saved = chain.newest()
    step = _reached(session)
    lost = step - _step(saved)
    must(_step(saved) >= _step(session.resumed_from), f"{session.resumed_from} is lost")
    must(lost <= chain.shape.save_every, f"{lost} steps lost")
    hit = session.moment(at)
    if victim.how == "train" and "rank" not in victim.name:
        must(lost == 0, f"ranks without a launcher lost {lost} steps\n{session.output}")
    if saved is None:
        _refused(chain)
    return Kill(
        killed=victim.name,
        how=victim.how,
        step=step,
        moment=hit.words,
        in_save=hit.in_save,
        steps_lost=lost,
        survivors_left_seconds=round(seconds, 2),
        resumed_from=saved,
    )


def signal_once(
    chain: Chain, number: signal.Signals, how: str, moment: Moment, usual: dict[str, float], save_first: bool = False
) -> Signalled | None:
    """Starts or resumes the run, signals it at that moment, waits until nothing of it lives, and looks at what is left.

    save_first: a SIGUSR1 at that moment and the other signal when the run has saved and gone on. None when the run came
    to its end before. Raises BrokenPromiseError.
    """
    with chain.start(how) as session:
        if not _await(session, moment, usual) or (save_first and not _saves_and_goes_on(session)):
            session.until_over()
            return None
        at, wall = time.monotonic(), time.time()
        _send(session, number)
        seconds = session.until_gone(at)
        _went_on_from_the_newest(session)
        codes = session.exit_codes()
    outcome = _outcome(chain)
    if outcome.get("completed"):
        return None
    must(how == "deepspeed" or not any(codes), f"exit codes {codes}\n{session.output}")
    ends = [session.markers(rank)[-1].words for rank in range(RANKS)]
    must(ends == ["exit 0"] * RANKS and outcome.get("exit_code") == 0, f"the ranks ended with {ends}\n{session.output}")
    must(seconds <= GRACE_SECONDS, f"the ranks took {seconds:.1f} s")
    _all_are_whole(chain)
    must(chain.newest() is not None, "there is no checkpoint")
    must(_step(chain.newest()) == _reached(session), f"stopped at step {_reached(session)}, saved: {chain.newest()}")
    reason = "the launcher is gone" if how == "deepspeed" else f"interrupted by {number.name}"
    must([end["reason"] for end in session.wrote("end")] == [reason], f"the log ends with {session.wrote('end')}")
    log = chain.run / "training_log.md"
    must(log.stat().st_mtime > wall and reason[1:] in log.read_text(), "the training log was not written")
    after = [_micro_batches_after_signal(session, rank) for rank in range(RANKS)]
    must(max(after) <= MICRO_BATCHES_MOST, f"{after} micro-batches after the signal")
    hit = session.moment(at)
    return Signalled(
        signal=number.name,
        how=how,
        step=_reached(session),
        moment=hit.words,
        in_save=hit.in_save,
        saved_before=save_first,
        in_window=any(mark.words.endswith("left") for mark in session.markers()),
        micro_batches_after=after,
        ranks_left_seconds=round(seconds, 2),
    )


def kills_summary(kills: list[Kill]) -> dict[str, Any]:
    """The figures, and the single kills."""
    return {
        "kills": len(kills),
        "in_a_save": sum(kill.in_save for kill in kills),
        "before_the_first_checkpoint": sum(kill.resumed_from is None for kill in kills),
        "earliest_step": min((kill.step for kill in kills), default=None),
        "steps_lost_most": max((kill.steps_lost for kill in kills), default=None),
        "survivors_left_seconds_most": max((kill.survivors_left_seconds for kill in kills), default=None),
        "each": [asdict(kill) for kill in kills],
    }


def signals_summary(signals: list[Signalled]) -> dict[str, Any]:
    """The figures, and the single signals."""
    return {
        "signals": len(signals),
        "sigterm_to_gpt2ds": sum((one.signal, one.how) == ("SIGTERM", "train") for one in signals),
        "sigterm_to_deepspeed": sum((one.signal, one.how) == ("SIGTERM", "deepspeed") for one in signals),
        "in_the_middle_of_a_step": sum(one.in_window for one in signals),
        "in_a_save": sum(one.in_save for one in signals),
        "micro_batches_after_most": max((max(one.micro_batches_after) for one in signals), default=None),
        "ranks_left_seconds_most": max((one.ranks_left_seconds for one in signals), default=None),
        "each": [asdict(one) for one in signals],
    }


def _await(session: Session, moment: Moment, usual: dict[str, float]) -> bool:
    """Waits for the moment; False when the ranks leave before it comes."""

    def count() -> int:
        return sum(kind_of(mark) == moment.kind for mark in session.markers())

    def over() -> bool:
        left = any(mark.words.startswith("exit") for mark in session.markers()[-1:])
        return left or None not in [started.poll() for started in session.processes]

    session.until(lambda: count() >= moment.nth or over(), START_SECONDS * 2, f"{moment}")
    if count() < moment.nth:
        return False
    time.sleep(moment.fraction * usual.get(moment.kind, 0.1))
    return not over()


def _doomed(session: Session, victim: Victim) -> list[int]:
    if victim.name == "gpt2ds train":
        return [session.processes[0].pid]
    if victim.name == "launcher":
        return [session.launcher().pid]
    pids = [rank.pid for rank in session.ranks()]
    return pids if victim.name == "all ranks" else [pids[int(victim.name[-1])]]


def _outcome(chain: Chain) -> dict[str, Any]:
    """The run's own mark of its end; empty when the last session did not leave one."""
    try:
        found: dict[str, Any] = json.loads((chain.run / "outcome.json").read_text())
    except FileNotFoundError:
        return {}
    return found


def _send(session: Session, number: signal.Signals) -> None:
    """To the program that the user started, or to each rank where there is none."""
    for started in session.processes:
        os.kill(started.pid, number)


def _saves_and_goes_on(session: Session) -> bool:
    """SIGUSR1: a checkpoint after this step, or the next one, and training goes on; False when the run ended first."""
    at, before = time.monotonic(), _reached(session)
    _send(session, signal.SIGUSR1)

    def after_save() -> list[Marked]:
        marks = session.markers()
        ended = [index for index, mark in enumerate(marks) if mark.at > at and kind_of(mark) == "ended"]
        return marks[ended[0] :] if ended else []

    def goes_on() -> bool:
        return any(mark.words.startswith(("micro", "exit")) for mark in after_save())

    session.until(goes_on, GRACE_SECONDS, "it saves and goes on")
    saved, *following = after_save()
    step = int(saved.words.split()[1])
    must(step <= before + 2, f"asked to save in step {before + 1}, saved at {step}")
    return not any(mark.words.startswith("exit") for mark in following)


def _reached(session: Session) -> int:
    """The last step of this session, or the one that it went on from."""
    steps = [record["step"] for record in session.wrote("step")]
    return steps[-1] if steps else _step(session.resumed_from)


def _step(name: str | None) -> int:
    return int(name.rpartition("-")[2]) if name else 0


def _went_on_from_the_newest(session: Session) -> None:
    for start in session.wrote("start"):
        must(start["resumed_from"] == session.resumed_from, f"{session.resumed_from}, but resumed {start}")


def _all_are_whole(chain: Chain) -> None:
    """A folder with a manifest is a whole checkpoint, at any moment."""
    for path in chain.run.glob("checkpoints/step-*/manifest.json"):
        try:
            verify(path.parent)
        except ValueError as damage:
            must(False, f"{path.parent.name} has a manifest, but {damage}")


def _refused(chain: Chain) -> None:
    """Nothing to resume from: --resume says so, and the run is begun anew."""
    with chain.start("ranks") as session:
        codes = session.exit_codes()
        must(codes == [2] * RANKS and "found no complete checkpoint" in session.output, f"{codes}\n{session.output}")
        session.until_gone(time.monotonic())
    shutil.rmtree(chain.run)


def _micro_batches_after_signal(session: Session, rank: int) -> int:
    marks = session.markers(rank)
    words = {f"signal {number.value}" for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    stops = [index for index, mark in enumerate(marks) if mark.words in words]
    return sum(kind_of(mark) == "micro" for mark in marks[stops[0] :]) if stops else 0
