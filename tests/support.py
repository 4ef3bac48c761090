"""Running scripts on several ranks and the command line as a user would, in processes of their own."""

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from warm import WarmPython

TESTS = Path(__file__).parent
PROFILES = TESTS.parent / "ds_configs"


def cpu_environment(**more: str) -> dict[str, str]:
    """This process's environment, made ready for DeepSpeed on CPUs."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path} | more


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(words: Sequence[Any], *, cwd: Path, ranks: int = 2, **environment: str) -> list[WarmPython]:
    """Starts a script, or -m and a module, as every rank of one group, without a launcher.

    Rank R prints into the files out-R and err-R.
    """
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        WarmPython(
            [str(word) for word in words],
            cwd=cwd,
            env=cpu_environment(RANK=str(rank), LOCAL_RANK=str(rank), **group, **environment),
            out=cwd / f"out-{rank}",
            err=cwd / f"err-{rank}",
        )
        for rank in range(ranks)
    ]


def end_ranks(started: list[WarmPython], *, cwd: Path, timeout: float = 240) -> list[subprocess.CompletedProcess[str]]:
    """Waits for the ranks of `start_ranks` and returns how they ended."""
    try:
        codes = [rank.wait(timeout) for rank in started]
    finally:
        for rank in started:
            rank.kill()
    return [
        subprocess.CompletedProcess(
            rank.args, code, *((cwd / f"{name}-{number}").read_text() for name in ("out", "err"))
        )
        for number, (rank, code) in enumerate(zip(started, codes, strict=True))
    ]


def run_ranks(
    script: Path, *arguments: Any, ranks: int = 2, timeout: float = 240
) -> list[subprocess.CompletedProcess[str]]:
    """Runs a script as every rank of one group and returns all results; fails the test when a rank fails."""
    with tempfile.TemporaryDirectory() as folder:
        started = start_ranks([script, *arguments], cwd=Path(folder), ranks=ranks)
        results = end_ranks(started, cwd=Path(folder), timeout=timeout)
    for rank, result in enumerate(results):
        assert result.returncode == 0, f"rank {rank} failed:\n{result.stdout}\n{result.stderr}"
    return results


def run_cli(*arguments: Any, cwd: Path, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `gpt2ds ...` as a user would, in a process of its own: a warm one, unless its environment is special."""
    words = ["-m", "gpt2ds", *map(str, arguments)]
    env = cpu_environment(**environment)
    if environment:
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = WarmPython(words, cwd=cwd, env=env, out=out, err=err)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


def load_benchmark(name: str) -> ModuleType:
    """benchmarks/NAME.py as a module, without running it."""
    folder = TESTS.parent / "benchmarks"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # as when it is run: it may import its neighbours
    path = folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None and spec.loader is not None, path
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
