"""The doctor's all-reduce: starts real ranks in processes of their own, and says what came of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2ds.devices import free_port
from gpt2ds.doctor.finding import Finding, ok, problem

PACKAGE_ROOT = Path(__file__).parents[2]

# Importing torch and starting CUDA from a cold disk take half of it; each rank on a busy CPU a little more.
START_SECONDS = 60.0
SECONDS_PER_RANK = 2.0
LOOK_EVERY_SECONDS = 0.05
UNKILLABLE_SECONDS = 10.0
BEFORE_THE_GROUP = ("starting Python", "importing torch", "starting CUDA")
SETTINGS = ("NCCL_", "GLOO_", "TORCH_NCCL_")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How an all-reduce ended: a `failure` in words, or its speed."""

    failure: str = ""
    stage: str = ""
    """What a rank that failed or hung was doing."""
    bus_bytes_per_second: float = 0.0
    """What crosses each rank's link: 2 (ranks - 1) / ranks of the bytes in the time of one all-reduce."""


def check_all_reduce(ranks: int, *, cuda: bool, timeout_seconds: float | None = None) -> Finding:
    """Runs it; where cards fail, once more without peer-to-peer."""
    backend = "nccl" if cuda else "gloo"
    limit = timeout_seconds or START_SECONDS + SECONDS_PER_RANK * ranks
    outcome = all_reduce(backend, ranks, limit)
    many = f"{ranks} ranks" if ranks > 1 else "1 rank"
    if not outcome.failure:
        speed = f": {outcome.bus_bytes_per_second / 1e9:.1f} GB/s with 64 MiB" if ranks > 1 else ""
        return ok("all-reduce", f"{many} by {backend} add up right{speed}.")
    what = f"{many} by {backend} {outcome.failure}."
    tried = cuda and ranks > 1 and outcome.stage not in BEFORE_THE_GROUP
    if tried and os.environ.get("NCCL_P2P_DISABLE", "0") in ("", "0"):
        again = all_reduce(backend, ranks, limit, {"NCCL_P2P_DISABLE": "1"})
        if not again.failure:
            return problem("all-reduce", f"{what} Without peer-to-peer they add up right.", "export NCCL_P2P_DISABLE=1")
        what += " Without peer-to-peer they fail as well."
    if outcome.stage in BEFORE_THE_GROUP and outcome.failure.startswith("hang"):
        fix = "Try it again: from a cold disk or a network's the first import of torch takes minutes."
        return problem("all-reduce", what, fix)
    return problem("all-reduce", what, _fix(cuda))


def _fix(cuda: bool) -> str:
    given = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)]
    if given:
        return f"Try it without {', '.join(given)}."
    if cuda:
        return "NCCL_DEBUG=INFO gpt2ds doctor puts NCCL's own account into that log."
    return "export GLOO_SOCKET_IFNAME=lo, and let a firewall pass connections of this machine to itself."


def all_reduce(backend: str, ranks: int, timeout_seconds: float, more: dict[str, str] | None = None) -> Outcome:
    """One group of ranks on this machine, `more` added to their environment. No process is left behind; the log is,
    when something failed.
    """
    folder = Path(tempfile.mkdtemp(prefix="gpt2ds-doctor-"))
    port = free_port()
    environments = [_environment(rank, ranks, port) | (more or {}) for rank in range(ranks)]
    try:
        codes = _run(backend, folder, environments, timeout_seconds)
    except BaseException:
        shutil.rmtree(folder)  # interrupted: nobody will read it
        raise
    outcome = _outcome(folder, codes, timeout_seconds)
    if not outcome.failure:
        shutil.rmtree(folder)
    return outcome


def _run(backend: str, folder: Path, environments: list[dict[str, str]], timeout_seconds: float) -> list[int | None]:
    """Every rank's exit code when all have ended, one has failed, or the time is over; None for those that still ran
    and were killed.
    """
    deadline = time.monotonic() + timeout_seconds
    # -P: the folder that the user stands in is no place to import from.
    worker = [sys.executable, "-P", "-m", "gpt2ds.doctor.worker", backend, str(folder)]
    command = [*worker, str(int(timeout_seconds) + 10)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, environment in enumerate(environments):
            with (folder / f"rank{rank}.log").open("wb") as log:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches only us, and we end them
                )
            processes.append(process)
        while True:
            codes = [process.poll() for process in processes]
            if None not in codes or any(codes) or time.monotonic() > deadline:
                return codes
            time.sleep(LOOK_EVERY_SECONDS)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            with suppress(subprocess.TimeoutExpired):  # a hung driver keeps even a killed process
                process.wait(UNKILLABLE_SECONDS)


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH"))))
    # As the trainer's launcher does on one machine; and the cards in NVML's order.
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} | os.environ | group | own


def _outcome(folder: Path, codes: list[int | None], timeout_seconds: float) -> Outcome:
    reports = [_report(folder / f"rank{rank}.json") for rank in range(len(codes))]
    for rank, code in enumerate(codes):
        if code:
            said = reports[rank].get("error") or _last_line(folder / f"rank{rank}.log")
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else "failed"
            what = f"{how} while {reports[rank]['stage']}: {said.rstrip('.')}"
            return Outcome(
                failure=f"do not get through: rank {rank} {what} (log: {folder})", stage=reports[rank]["stage"]
            )
    waiting = {rank: str(reports[rank]["stage"]) for rank, code in enumerate(codes) if code is None}
    if waiting:
        places = ", ".join(f"rank {rank} while {stage}" for rank, stage in waiting.items())
        what = f"hang: no end within {timeout_seconds:.0f} s, {places} (log: {folder})"
        return Outcome(failure=what, stage=next(iter(waiting.values())))
    wrong = [rank for rank, report in enumerate(reports) if not report["right"]]
    if wrong:
        return Outcome(failure=f"add up wrong: rank {wrong[0]} has another sum (log: {folder})", stage="done")
    ranks, slowest = len(codes), max(float(report["seconds"]) for report in reports)
    return Outcome(bus_bytes_per_second=2 * (ranks - 1) / ranks * float(reports[0]["bytes"]) / slowest)


def _report(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"stage": BEFORE_THE_GROUP[0]}
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it printed nothing")
