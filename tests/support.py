"""Running scripts on several ranks and the command line as a user would, in processes of their own."""

import importlib.util
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

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


def run_ranks(
    script: Path, *arguments: Any, ranks: int = 2, timeout: float = 240
) -> list[subprocess.CompletedProcess[str]]:
    """Runs a script as every rank of one group and returns all results; fails the test when a rank fails."""
    rendezvous = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env=cpu_environment(RANK=str(rank), LOCAL_RANK=str(rank), **rendezvous),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]

    def finish(process: "subprocess.Popen[str]") -> subprocess.CompletedProcess[str]:
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    try:
        # All at once: a rank whose full pipe nobody empties would stop, and the others wait for it.
        with ThreadPoolExecutor(ranks) as readers:
            results = list(readers.map(finish, processes))
    finally:
        for process in processes:
            process.kill()
    for rank, result in enumerate(results):
        assert result.returncode == 0, f"rank {rank} failed:\n{result.stdout}\n{result.stderr}"
    return results


def run_cli(*arguments: Any, cwd: Path, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `gpt2ds ...` as a user would, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "gpt2ds", *map(str, arguments)],
        cwd=cwd,
        env=cpu_environment(**environment),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


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
