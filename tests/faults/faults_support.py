"""Real runs of two CPU ranks whose processes can be found, signalled and waited for."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from support import cpu_environment, start_ranks

REPOSITORY = Path(__file__).parents[2]


class FaultyRun:
    """A run `a` below a folder; a context manager that leaves no process behind.

    ranks: how many to start without any launcher. command, environment: for what is started otherwise, by default
    `gpt2ds`. options: of `train`, by their names with underscores, over those of a small model that would train for
    ever.
    """

    def __init__(
        self,
        folder: Path,
        models_file: Path,
        corpus: Path,
        *,
        ranks: int = 0,
        command: list[str] | None = None,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.run = folder / "logs" / "a"
        words = ["train"]
        settings: dict[str, Any] = {
            "ds": "fp32_baseline",
            "model": "small",
            "models_file": models_file,
            "data": corpus,
            "name": "a",
            "micro_batch": 2,
            "accumulation": 2,
            "steps": 1_000_000,
            "evaluate_every": 1_000_000,
            "evaluation_windows": 2,
            "sample_tokens": 1,
        } | options
        for name, value in settings.items():
            words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        self._folder = folder
        if ranks:
            self._started = [*start_ranks(["-m", "gpt2ds", *words], cwd=folder, ranks=ranks)]
        else:
            command = command or [sys.executable, "-m", "gpt2ds"]
            env = cpu_environment(**(environment or {}))
            with (folder / "out").open("w") as out:
                self._started = [
                    subprocess.Popen([*command, *words], cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT)
                ]
        self._without_launcher = [psutil.Process(started.pid) for started in self._started] if ranks else []
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> "FaultyRun":
        return self

    def __exit__(self, *_: object) -> None:
        self._note()
        for process in self._seen:
            if process.is_running():
                process.kill()
        for started in self._started:
            started.kill()
            started.wait()

    @property
    def output(self) -> str:
        """What the run and its launcher have printed so far."""
        files = [file for pattern in ("out*", "err*") for file in sorted(self._folder.glob(pattern))]
        return "".join(file.read_text(encoding="utf-8") for file in files)

    def signal(self, number: signal.Signals) -> None:
        """To what was started."""
        for started in self._started:
            os.kill(started.pid, number)

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The whole lines of this kind in the metrics so far."""
        try:
            lines = (self.run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        except OSError:
            return []
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def saved(self) -> list[str]:
        """The complete checkpoints."""
        return sorted(path.parent.name for path in self.run.glob("checkpoints/step-*/manifest.json"))

    def until(self, happened: Callable[[], Any], seconds: float) -> None:
        """Waits until it has happened; fails with what was printed when it has not after so long."""
        deadline = time.monotonic() + seconds
        while not happened():
            self._note()
            assert time.monotonic() < deadline, f"not within {seconds} s\n{self.output}"
            time.sleep(0.05)
        self._note()

    def until_step(self, more: int = 1, seconds: float = 60) -> None:
        """Waits for so many more steps than there are now."""
        wanted = len(self.records("step")) + more
        self.until(lambda: len(self.records("step")) >= wanted, seconds)

    def launcher(self) -> psutil.Process:
        """DeepSpeed's launcher, the parent of the ranks."""
        (found,) = [process for process in self._family() if "deepspeed.launcher.launch" in _command(process)]
        return found

    def ranks(self) -> list[psutil.Process]:
        """The living ranks, in order."""
        found = [process for process in self._seen if _rank(process) is not None]
        found.sort(key=lambda rank: _rank(rank) or 0)
        return [process for process in self._without_launcher or found if _lives(process)]

    def end(self, seconds: float) -> int:
        """Waits until what was started and every rank have ended; returns the exit code of the former."""
        self.until(lambda: None not in [started.poll() for started in self._started] and not self.ranks(), seconds)
        (code,) = {started.wait() for started in self._started}
        return code

    def _family(self) -> list[psutil.Process]:
        found = []
        for started in self._started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(started.pid)
                found += [process, *process.children(recursive=True)]
        return found

    def _note(self) -> None:
        self._seen |= {process for process in self._family() if _command(process)}


def kill(process: psutil.Process) -> None:
    """kill -9."""
    os.kill(process.pid, signal.SIGKILL)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _rank(process: psutil.Process) -> int | None:
    for word in _command(process):
        if word.startswith("--local_rank="):
            return int(word.partition("=")[2])
    return None
