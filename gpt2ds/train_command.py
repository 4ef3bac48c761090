"""What `gpt2ds train` does: start ranks and see to it that they end well, or be one of them."""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from gpt2ds.errors import RankLostError, UserError
from gpt2ds.options import TrainOptions

if TYPE_CHECKING:
    from gpt2ds.plan import Plan
    from gpt2ds.runlog.metrics import Recorder
    from gpt2ds.training.guard import StopSignals
    from gpt2ds.training.memory_watch import MemoryWatch


def run_train(
    options: TrainOptions,
    arguments: list[str],
    *,
    gpus: int | None,
    restarts: int | None,
    say: Callable[[str], None],
    tell: Callable[[str], None],
) -> int:
    """Trains, here or on ranks of its own, and returns the exit code.

    arguments: the command line that the options come from, for the ranks. say: the result; tell: what happens on the
    way. Raises UserError for mistakes, and whatever training raises.
    """
    from gpt2ds.launcher import under_launcher

    if under_launcher():
        if restarts is not None or gpus is not None:
            given = "--gpus" if restarts is None else "--restarts"
            raise UserError(
                f"{given} is for `gpt2ds train` when it starts the launcher itself, but RANK={os.environ['RANK']} says "
                f"that this is one rank of a run already: leave {given} out, or start with `env -u RANK`."
            )
        if "WORLD_SIZE" not in os.environ:
            raise UserError("RANK is set but WORLD_SIZE is not: set both as launchers do, or start with `env -u RANK`.")
    elif gpus is not None or restarts is not None:
        from gpt2ds.restarts import supervise

        arguments = _without_option(_without_option(arguments, "--gpus"), "--restarts")
        return supervise(
            1 if gpus is None else gpus,
            arguments,
            out=options.out,
            name=options.name,
            resume=options.resume,
            restarts=restarts or 0,
            tell=tell,
        )
    from gpt2ds.training.guard import StopSignals

    with StopSignals() as signals:  # from here on a signal costs nothing that was done
        return _train_here(options, signals, say)


def _train_here(options: TrainOptions, signals: "StopSignals", say: Callable[[str], None]) -> int:
    """This process as a rank of the run."""
    from gpt2ds.devices import prepare_cuda
    from gpt2ds.planning import resolve

    plan = resolve(options, ranks=int(os.environ.get("WORLD_SIZE", "1")))
    prepare_cuda()
    if plan.device_kind == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed looks for one, and says so
    from gpt2ds.runlog.report import resume_command, write_report
    from gpt2ds.training.session import train

    try:
        outcome = train(plan, _recorder, signals, _memory_watch(plan))
    except UserError:
        raise
    except Exception as error:
        # The log of a run that failed says how; what went wrong follows.
        speaks = error.speaks if isinstance(error, RankLostError) else os.environ.get("RANK", "0") == "0"
        if speaks and (plan.folder / "plan.json").exists():
            with suppress(OSError):
                write_report(plan.folder)
        raise
    code = outcome.exit_code
    if not outcome.is_main:
        return code
    words = f"{outcome.ending.reason} at step {outcome.step:,}."
    try:
        outcome.write()  # first: nothing that draws pictures decides how the run ended
        words += f" Training log: {write_report(outcome.folder)}"
    except OSError as error:
        words += f" The run folder cannot be written ({error.strerror}): gpt2ds report {plan.run} writes its log."
        code = 1
    except Exception as error:
        words += f" The training log could not be drawn ({error!r}): gpt2ds report {plan.run} tries it again."
    if not outcome.ending.completed:
        words += f"\nResume with: {resume_command(plan.to_dict())}"
    say(words)
    return code


def _recorder(plan: "Plan") -> "Recorder":
    from gpt2ds.runlog.console import console_view
    from gpt2ds.runlog.metrics import RunLog
    from gpt2ds.runlog.report import ReportView

    return RunLog(plan.folder, [console_view(plan.to_dict()), ReportView(plan.folder)])


def _memory_watch(plan: "Plan") -> "MemoryWatch | None":
    """The training loop measures CUDA's memory itself; on a CPU it takes counting every tensor, if asked for."""
    if plan.device_kind != "cpu" or not plan.options.watch_memory:
        return None
    from gpt2ds.probe.tensor_watch import TensorWatch

    return TensorWatch()


def _without_option(arguments: list[str], name: str) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith(f"{name}=") and argument != name:
            kept.append(argument)
        skip = argument == name and not skip
    return kept
