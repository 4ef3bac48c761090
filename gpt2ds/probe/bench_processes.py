"""The processes of one bench setting: starts a worker per rank, waits with a limit, and says how they ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PACKAGE_ROOT = Path(__file__).parents[2]

# From an interrupt to the end by force: time to leave a compiler's lock file behind in good order, which would let the
# next build wait for ever.
PATIENCE_SECONDS = 5.0
LOOK_EVERY_SECONDS = 0.05

# Most of a log's end that is looked at.
LOG_END_BYTES = 20_000


def run_ranks(
    setting: dict[str, Any], *, cuda: bool, ranks: int, port: int, timeout_seconds: float, log: Path
) -> dict[str, Any]:
    """Runs bench_worker as every rank of one group; returns rank 0's report, or {"result", "why"} of a failure.

    When one rank dies the others are ended. All that they print goes to `log`. No process of theirs is left behind,
    also when this one is interrupted.
    """
    with tempfile.TemporaryDirectory(prefix="gpt2ds-bench-") as name, log.open("ab") as output:
        folder = Path(name)
        (folder / "setting.json").write_text(json.dumps(setting), encoding="utf-8")
        # -P: the folder that the user stands in is no place to import from.
        command = [sys.executable, "-P", "-m", "gpt2ds.probe.bench_worker", str(folder / "setting.json"), name]
        processes: list[subprocess.Popen[bytes]] = []
        deadline = time.monotonic() + timeout_seconds
        try:
            for rank in range(ranks):
                # In sessions of their own: Ctrl-C in a terminal reaches only us, and compilers end with their worker.
                environment = _environment(cuda=cuda, rank=rank, ranks=ranks, port=port)
                processes.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
            timed_out = not _wait(processes, deadline)
            codes = [process.poll() for process in processes]
        finally:
            _end(processes)
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rank*.json"))]
    if codes == [0] * ranks and len(reports) == ranks:
        return _without_ends(reports[0])
    if timed_out and not any(report["result"] == "out of memory" for report in reports):
        return {"result": "timed out", "why": f"no end within {timeout_seconds:g} s (--timeout)"}
    return _failure(reports, codes, log)


def _environment(*, cuda: bool, rank: int, ranks: int, port: int) -> dict[str, str]:
    size = str(ranks)
    path = os.pathsep.join(filter(None, (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    environment |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "LOCAL_SIZE": size}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return environment if cuda else environment | {"DS_ACCELERATOR": "cpu"}


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> bool:
    """Until all have ended or one has failed; False when the time is over first."""
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_EVERY_SECONDS)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Interrupts what still runs, and ends by force what does not heed it."""
    patience = time.monotonic() + PATIENCE_SECONDS
    for number in (signal.SIGINT, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, patience - time.monotonic()) if number == signal.SIGINT else None)


def _failure(reports: list[dict[str, Any]], codes: list[int | None], log: Path) -> dict[str, Any]:
    """The cause among all ranks' ends: want of memory, then a rank that was ended from outside, then what was reported
    first. A rank whose partner has gone reports that or aborts, a little later.
    """
    failed = [report for report in reports if report["result"] != "measured"]
    cause = min(failed, key=lambda report: (report["result"] != "out of memory", report["at"]), default=None)
    ended = any(code is not None and code < 0 and code != -signal.SIGABRT for code in codes)
    if cause and (cause["result"] == "out of memory" or not ended):
        where = f" (rank {cause['rank']})" if len(codes) > 1 else ""
        return _without_ends(cause) | {"why": f"{cause['why']}{where}"}
    # The lowest code: a signal's number stands there as a negative one.
    code, rank = min((code or 0, rank) for rank, code in enumerate(codes) if code is not None)
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_END_BYTES))
        end = file.read().decode(errors="replace")
    if code == -signal.SIGKILL:
        why = f"rank {rank} was killed (SIGKILL), which Linux does when the machine's memory is used up"
        return {"result": "out of memory", "why": why}
    if "std::bad_alloc" in end or "out of memory" in end:
        return {"result": "out of memory", "why": f"rank {rank} ended without a report; its log has the allocation"}
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    last = next((line.strip()[:300] for line in reversed(end.splitlines()) if line.strip()), "nothing was printed")
    return {"result": "crashed", "why": f"rank {rank} ended {how}: {last}"}


def _without_ends(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in ("rank", "at")}
