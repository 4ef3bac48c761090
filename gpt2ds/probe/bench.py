"""Measured speed and memory of many settings: a few real optimizer steps of each in fresh processes.

Nothing of one setting leaks into the next, and none that fails ends the others: out of memory, a refusal and a crash
are results like a speed.
"""

import itertools
import json
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from gpt2ds import __version__
from gpt2ds.devices import Machine, free_port, this_machine
from gpt2ds.errors import UserError
from gpt2ds.estimate.rows import memory_setting
from gpt2ds.files import write_atomically
from gpt2ds.memory.fit import largest_micro_batch
from gpt2ds.plan import Plan
from gpt2ds.probe.bench_processes import run_ranks
from gpt2ds.probe.bench_report import summary
from gpt2ds.probe.bench_settings import (
    WARM_UP_STEPS,
    BenchOptions,
    Candidate,
    Note,
    all_candidates,
    described,
    resolved,
)

# With --largest a micro-batch has to run, and its speed is a welcome extra.
TIMED_STEPS_OF_A_SEARCH = 2


def run_bench(options: BenchOptions, note: Note) -> tuple[dict[str, Any], Path]:
    """Measures every setting; returns what bench.json holds, and its folder.

    note: takes a line of progress. bench.json is written anew after each setting, so that an interruption costs only
    the one being measured. Raises UserError when nothing that was asked for can be run.
    """
    machine = this_machine()
    options, candidates = all_candidates(options, machine, note)
    folder = options.out or Path("logs") / time.strftime("bench-%Y%m%d-%H%M%S")
    if (folder / "bench.json").exists():
        raise UserError(f"{folder} holds a bench already: choose another --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): choose another --out.") from error
    session = _Session(options, machine, folder, note, next(each.plan for each in candidates if each.plan))
    with _ended_in_good_order():
        for number, candidate in enumerate(candidates, start=1):
            session.place = f"[{number}/{len(candidates)}] "
            if options.largest and candidate.plan:
                session.search(candidate)
            else:
                session.measure(candidate, options.steps)
    return session.bench, folder


class _Session:
    """A bench going on: its results so far, and their file."""

    def __init__(self, options: BenchOptions, machine: Machine, folder: Path, note: Note, plan: Plan) -> None:
        self.options = options
        self.machine = machine
        self.folder = folder
        self.note = note
        self.place = ""
        self.logs = itertools.count(1)
        self.bench = _about(options, machine, plan)

    def measure(self, candidate: Candidate, steps: int) -> dict[str, Any]:
        """Runs one setting and adds its record to the bench."""
        record = described(candidate)
        if candidate.plan is None:
            record |= {"result": "refused", "why": candidate.refusal}
        else:
            record |= self.run(candidate.plan, steps)
            _compare(record)
        self.bench["settings"].append(record)
        self.write()
        self.note(f"{self.place}{summary(record)}")
        return record

    def run(self, plan: Plan, steps: int) -> dict[str, Any]:
        """The real steps: what rank 0 reports, or how they failed."""
        cuda = plan.device_kind == "cuda"
        log = self.folder / f"setting-{next(self.logs):02}.log"
        setting = {
            "options": plan.options.to_dict(),
            "ranks": plan.ranks,
            "steps": steps,
            "warm_up_steps": WARM_UP_STEPS,
            "host_bytes": None if cuda else _available_bytes() // plan.ranks,
        }
        start = time.monotonic()
        report = run_ranks(
            setting,
            cuda=cuda,
            ranks=plan.ranks,
            port=free_port(),
            timeout_seconds=self.options.timeout_seconds,
            log=log,
        )
        if report["result"] in ("measured", "refused"):
            log.unlink(missing_ok=True)
        else:
            report["log"] = log.name
        return report | {"seconds": round(time.monotonic() - start, 1)}

    def search(self, candidate: Candidate) -> None:
        """The largest micro-batch that runs, from the predicted one on, and the next one that does not."""
        plan = candidate.plan
        assert plan is not None
        one = memory_setting(
            plan.options,
            plan.profile,
            plan.model,
            ranks=plan.ranks,
            micro_batch=1,
            accumulation=plan.accumulation,
            machine=plan.machine,
        )
        predicted = largest_micro_batch(one, plan.device_bytes)
        tried: dict[int, dict[str, Any]] = {}

        def runs(micro_batch: int) -> bool | None:
            asked = resolved(self.options, self.machine, candidate.ds, micro_batch, candidate.recompute)
            tried[micro_batch] = self.measure(asked, min(self.options.steps, TIMED_STEPS_OF_A_SEARCH))
            return {"measured": True, "out of memory": False}.get(tried[micro_batch]["result"])

        runs_at, fails_at = largest_that_runs(predicted, runs)
        last = tried[max(tried)] if fails_at is None else tried[fails_at]
        self.bench.setdefault("largest", []).append(
            {
                "profile": candidate.label,
                "recompute": plan.recompute,
                "predicted": predicted,
                "runs": runs_at,
                "fails": fails_at,
                "how": last["result"] if fails_at else next(reversed(tried.values()))["result"],
                "tried": list(tried),
            }
        )
        self.write()

    def write(self) -> None:
        """bench.json as it stands."""
        write_atomically(self.folder / "bench.json", (json.dumps(self.bench, indent=1) + "\n").encode())


def largest_that_runs(start: int, runs: Callable[[int], bool | None], most: int = 4096) -> tuple[int, int | None]:
    """(the largest size that runs or 0, the next one that does not), from a guess on and in few trials.

    runs: True, False, or None for another failure, which ends the search; the second value is None then, and at `most`.
    From the guess in steps of 1, 2, 4, ... up or down, until one that runs and one that does not are known; then the
    middle between them.
    """
    low, high, step, size = 0, most + 1, 1, min(max(1, start), most)
    while high - low > 1:
        answer = runs(size)
        if answer is None:
            return low, None
        low, high = (size, high) if answer else (low, size)
        if low and high <= most:
            size = (low + high) // 2
        else:
            size = min(low + step, most) if low else max(high - step, 1)
            step *= 2
    return low, high if high <= most else None


def _compare(record: dict[str, Any]) -> None:
    """Predicted beside measured: how much the prediction is above the most that a rank allocated, in % of that."""
    predicted = record["predicted"]
    if predicted and record["result"] == "measured":
        predicted["difference_percent"] = round(100 * (predicted["peak_bytes"] / max(record["peak_bytes"]) - 1), 2)


def _about(options: BenchOptions, machine: Machine, plan: Plan) -> dict[str, Any]:
    packages = ("torch", "deepspeed", "numpy")
    cuda = bool(machine.gpus)
    return {
        "what": "tokens/s and memory of a few real optimizer steps, each setting in fresh processes",
        "measured_at": time.strftime("%Y-%m-%d %H:%M"),
        "device": machine.to_dict()
        | {
            "kind": machine.kind,
            "name": machine.gpus[0].name if cuda else machine.cpu_name,
            "usable_bytes": plan.device_bytes,
            "gpu_memory_gb": options.gpu_memory if cuda else None,
        },
        "memory_is": "peak of torch's CUDA allocator, per rank"
        if cuda
        else "peak resident memory of a rank's process on a CPU: not a GPU, and not comparable with GPU memory",
        "versions": {"gpt2ds": __version__, "python": platform.python_version()}
        | {package: version(package) for package in packages},
        "model": plan.model.to_dict() | {"parameters": plan.model.parameters},
        "data": {"name": plan.corpus.name, "digest": plan.corpus.digest},
        "ranks": plan.ranks,
        "accumulation": plan.accumulation,
        "context": plan.context,
        "steps": min(options.steps, TIMED_STEPS_OF_A_SEARCH) if options.largest else options.steps,
        "warm_up_steps": WARM_UP_STEPS,
        "settings": [],
    }


def _available_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


@contextmanager
def _ended_in_good_order() -> Iterator[None]:
    """SIGTERM and SIGHUP end the ranks as well as us: they leave through the same door as Ctrl-C."""

    def leave(number: int, _: Any) -> NoReturn:
        raise SystemExit(128 + number)

    earlier = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
