"""Python programs in processes that have torch and DeepSpeed imported already: two thirds of what a short run takes.

Each is a fork of one process per test session that has imported other people's packages, and nothing of gpt2ds.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        *("torch", "torch._dynamo", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"),
        *("matplotlib.figure", "matplotlib.backends.backend_agg", "rich.console"),
    ]
)


class WarmPython:
    """`python WORDS`, words being a script or -m and a module, and arguments. Has what tests need of a Popen."""

    def __init__(
        self, words: Sequence[str], *, cwd: Path, env: Mapping[str, str], out: Path, err: Path | None = None
    ) -> None:
        """out, err: the files that what it prints is appended to; without err both go to out."""
        self.args = list(words)
        self._process = _FORKS.Process(target=_run, args=(self.args, str(cwd), dict(env), str(out), str(err or out)))
        with mock.patch.dict(os.environ, env):  # for the first one, which starts the process that forks
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Minus the signal's number if one ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """See returncode."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end; raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()


def _run(words: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # else it would be ignored under nohup
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for descriptor, path in enumerate((out, err), 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    if words[0] == "-m":
        sys.argv, sys.path[:0] = words[1:], [""]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = words, [str(Path(words[0]).resolve().parent)]
        runpy.run_path(words[0], run_name="__main__")
