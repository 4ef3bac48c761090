"""`gpt2ds doctor`: every trouble that can be made here for real is made, and found by name with its fix."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support import cpu_environment, run_cli

from gpt2ds.devices import GPU, MIB, Machine
from gpt2ds.doctor.examination import DoctorOptions, examine
from gpt2ds.doctor.finding import from_sentence
from gpt2ds.doctor.gpu import nvidia_driver
from gpt2ds.doctor.host import (
    check_allocator,
    check_build_locks,
    check_disk,
    check_host_memory,
    check_locked_memory,
    check_open_files,
    check_requirements,
    check_shared_memory,
)
from gpt2ds.doctor.ranks import all_reduce, check_all_reduce
from gpt2ds.ds_profile import DsProfile, load_profile
from gpt2ds.errors import UserError
from gpt2ds.gpt2.config import MODELS

GIB = 2**30
CPU = Machine(cpu_name="a CPU", cores=2, host_memory_bytes=24 * GIB)
RTX_4090 = GPU(name="NVIDIA GeForce RTX 4090", total_bytes=24_564 * MIB, free_bytes=24_207 * MIB)
CHECKS = ["torch", "profile", "build locks", "shared memory", "disk", "host memory", "open files", "all-reduce"]


@pytest.fixture(autouse=True)
def logs_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the logs of ranks that fail are left."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for torch to build operators in."""
    folder = tmp_path / "extensions"
    folder.mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    return folder


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system in memory with the given options."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    folder = tmp_path / "mounted"
    folder.mkdir()

    def do(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "gpt2ds-test", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not allowed here")
        return folder

    yield do
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def plant_lock(extensions: Path, age_seconds: float) -> Path:
    lock = extensions / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - age_seconds,) * 2)
    return lock


def test_a_machine_without_trouble(extensions: Path, tmp_path: Path) -> None:
    result = run_cli("doctor", "--json", "--model", "gpt2_tiny", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    told = json.loads(result.stdout)
    assert told["problems"] == 0
    # With cards, which are hidden here, there is a line about them as well.
    assert [finding["check"] for finding in told["findings"] if finding["check"] != "cards"] == CHECKS
    assert "2 ranks by gloo add up right" in told["findings"][-1]["found"]
    assert "GB/s" in told["findings"][-1]["found"]
    assert not list(tmp_path.glob("logs*")), "the doctor changes nothing"


def test_troubles_are_told_with_their_fix(extensions: Path, tmp_path: Path) -> None:
    """An abandoned lock, and an interface that does not exist, under which no group can come together."""
    lock = plant_lock(extensions, age_seconds=7200)
    result = run_cli("doctor", cwd=tmp_path, GLOO_SOCKET_IFNAME="nosuch0", COLUMNS="250", NO_COLOR="1")
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"fix: rm {lock}" in result.stdout
    assert "while joining the group" in result.stdout
    assert "nosuch0" in result.stdout
    assert "fix: Try it without GLOO_SOCKET_IFNAME=nosuch0." in result.stdout
    assert "2 problems" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_it_starts_without_torch() -> None:
    program = (
        "import sys, gpt2ds.doctor.examination, gpt2ds.doctor.report\n"
        "from gpt2ds.doctor.examination import *\n"
        "findings = examine(DoctorOptions())\n"
        "seen = [next(findings).check for _ in range(5)]\n"
        "print(sorted({'torch', 'deepspeed', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], env=cpu_environment(), capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus": 0}, ["--gpus", "at least 1"]),
        ({"ds": "zero22"}, ["did you mean"]),
        ({"model": "gpt2_lage"}, ["did you mean 'gpt2_large'"]),
        ({"out": Path(__file__) / "below"}, ["is a file", "name a folder"]),
        ({"out": Path("n" * 5000)}, ["--out", "Name another folder"]),
    ],
)
def test_bad_input(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        examine(DoctorOptions(**options))  # type: ignore[arg-type]
    assert all(word in str(error.value) for word in words), error.value


def test_bad_input_is_exit_code_2(tmp_path: Path) -> None:
    result = run_cli("doctor", "--ds", "nowhere.json", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")


def test_an_abandoned_lock_is_told_from_one_that_is_held(extensions: Path) -> None:
    assert [finding.level for finding in check_build_locks(needed=True)] == ["ok"]
    lock = plant_lock(extensions, age_seconds=7200)
    (abandoned,) = check_build_locks(needed=False)
    assert (abandoned.level, abandoned.fix) == ("problem", f"rm {lock}")
    assert "2 hours" in abandoned.found
    os.utime(lock)
    (young,) = check_build_locks(needed=False)
    assert young.level == "warning"
    lock.unlink()
    # As a build does it, by torch's own lock.
    program = f"from torch.utils.file_baton import FileBaton; b = FileBaton({str(lock)!r}); print(b.try_acquire())"
    with subprocess.Popen([sys.executable, "-ic", program], stdin=-1, stdout=-1, stderr=-3, text=True) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline().strip() == "True"
        os.utime(lock, (0, 0))
        (held,) = check_build_locks(needed=False)
        assert (held.level, str(builder.pid) in held.found) == ("ok", True)
        builder.kill()
    (left,) = check_build_locks(needed=False)
    assert left.level == "problem"


def test_a_folder_for_operators_that_cannot_be_written_to(
    mount: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(mount("ro,size=1m") / "extensions"))
    (finding,) = check_build_locks(needed=True)
    assert finding.level == "problem"
    assert "TORCH_EXTENSIONS_DIR" in finding.fix
    assert [finding.level for finding in check_build_locks(needed=False)] == ["ok"]


def test_a_small_disk_in_memory(mount: Callable[[str], Path]) -> None:
    out = mount("size=8m") / "logs"
    in_memory, full = check_disk(out, MODELS["gpt2_tiny"], "bf16", keep=2)
    assert in_memory.level == "warning" and "tmpfs" in in_memory.found
    assert full.level == "problem" and "smaller --keep" in full.fix
    assert not out.exists()


def test_a_disk_that_is_read_only(mount: Callable[[str], Path]) -> None:
    *_, finding = check_disk(mount("ro,size=1g") / "logs", MODELS["gpt2_tiny"], "bf16", keep=2)
    assert finding.level == "problem" and "not writable" in finding.found


def test_shared_memory(mount: Callable[[str], Path]) -> None:
    assert check_shared_memory(8, cuda=False).level == "ok"
    folder = mount("size=64m")
    assert check_shared_memory(1, cuda=True, folder=folder).level == "ok"
    two, eight = (check_shared_memory(ranks, cuda=True, folder=folder) for ranks in (2, 8))
    assert (two.level, eight.level) == ("warning", "problem")
    assert "--shm-size=1g" in two.fix


def test_host_memory() -> None:
    findings = examine(DoctorOptions(model="gpt2_xl", gpus=50))
    told = next(finding for finding in findings if finding.check == "host memory")
    assert told.level == "problem"
    assert "gpt2_xl" in told.found and "fewer ranks" in told.fix
    huge = replace(CPU, host_memory_bytes=2**50)
    assert check_host_memory({"weights": 2**45}, huge, MODELS["gpt2_xl"]).level == "warning"


def test_limits(monkeypatch: pytest.MonkeyPatch, own_profile: Callable[..., DsProfile]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        few = check_open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (few.level, few.fix) == ("warning", "ulimit -n 4096")
    assert check_locked_memory(load_profile("zero3_offload")) is None
    nvme = {"device": "nvme", "nvme_path": "/tmp"}
    assert check_locked_memory(own_profile(zero_optimization={"stage": 3, "offload_optimizer": nvme})) is not None
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    fixed = check_allocator(cuda=True)
    assert fixed is not None and "expandable_segments:True" in fixed.fix
    assert check_allocator(cuda=False) is None
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:64")
    assert check_allocator(cuda=True) is None


@pytest.fixture
def own_profile(tmp_path: Path) -> Callable[..., DsProfile]:
    """A profile with DeepSpeed's own Adam, which is compiled."""

    def make(**more: object) -> DsProfile:
        path = tmp_path / "own.json"
        optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": False}}
        path.write_text(
            json.dumps(
                {
                    "train_micro_batch_size_per_gpu": 2,
                    "bf16": {"enabled": True},
                    "zero_optimization": {"stage": 2},
                    "optimizer": optimizer,
                }
                | more
            )
        )
        return load_profile(path)

    return make


def test_what_a_profile_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_profile: Callable[..., DsProfile]
) -> None:
    assert [finding.level for finding in check_requirements(load_profile("zero2"), CPU, 1, None)] == ["ok"]
    compiled = own_profile()
    toolkit = tmp_path / "toolkit" / "bin"
    toolkit.mkdir(parents=True)
    for name in ("nvcc", "ninja", "c++"):
        (toolkit / name).write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
        (toolkit / name).chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(toolkit.parent))
    monkeypatch.setenv("PATH", str(toolkit))
    one_card = replace(CPU, gpus=(RTX_4090,))
    told = [finding for finding in check_requirements(compiled, one_card, 1, "13.0") if "Python.h" not in finding.found]
    assert [finding.level for finding in told] == ["warning"] and "CUDA 11.8" in told[0].found
    told = [finding for finding in check_requirements(compiled, one_card, 1, "11.8") if "Python.h" not in finding.found]
    assert "warning" not in [finding.level for finding in told]
    monkeypatch.setenv("PATH", str(tmp_path))
    fixes = [finding.fix for finding in check_requirements(compiled, CPU, 1, None)]
    assert "sudo apt install g++." in fixes and "pip install ninja." in fixes


def test_a_hung_rank_is_named_and_none_is_left(logs_of_ranks: Path) -> None:
    """192.0.2.1 is of an address range that nobody has (RFC 5737)."""
    start = time.monotonic()
    outcome = all_reduce("gloo", 2, 6.0, {"MASTER_ADDR": "192.0.2.1"})
    assert time.monotonic() - start < 12, "ended, not waited for"
    assert "joining the group" in outcome.failure, outcome
    assert list(logs_of_ranks.glob("gpt2ds-doctor-*/rank1.log")), "whoever mends it wants to read it"
    assert not [child for child in psutil.Process().children() if "gpt2ds.doctor.worker" in " ".join(child.cmdline())]


def test_a_card_that_does_not_start_is_no_question_of_peers() -> None:
    if nvidia_driver() is not None:
        pytest.skip("there are cards here")
    finding = check_all_reduce(2, cuda=True)
    assert finding.level == "problem"
    assert "starting CUDA" in finding.found and "peer" not in finding.found


def test_an_interrupt_ends_the_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpt2ds", "doctor"]
    environment = cpu_environment(PYTHONUNBUFFERED="1")
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as doctor:
        assert doctor.stdout is not None
        while "open files" not in doctor.stdout.readline():
            pass
        workers: list[psutil.Process] = []
        while len(workers) < 2:
            workers = psutil.Process(doctor.pid).children()
        doctor.send_signal(signal.SIGINT)
        assert doctor.wait(20) == 130
    assert not psutil.wait_procs(workers, timeout=20)[1]  # a dead one may wait a moment for being buried
    assert not list(tmp_path.glob("gpt2ds-doctor-*"))


def test_a_sentence_is_told_as_what_and_fix() -> None:
    assert from_sentence("disk", "It is full: make room.").fix == "make room."
    assert from_sentence("disk", "It is full.").found == "It is full."
