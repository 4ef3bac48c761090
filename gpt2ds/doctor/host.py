"""The doctor's checks of everything but the cards: compilers, abandoned build locks, shared memory, disk, limits."""

import os
import re
import resource
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from gpt2ds.devices import Machine
from gpt2ds.doctor.finding import Finding, from_sentence, ok, problem, warning
from gpt2ds.ds_profile import DsProfile
from gpt2ds.files import LOCAL_FILE_SYSTEMS, file_system
from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.requirements import (
    USUAL_NVCC,
    checkpoints_bytes,
    disk_problem,
    host_memory_problem,
    missing_requirements,
    nearest_folder,
)

GIB, MIB = 2**30, 2**20

# Below this age a lock without a holder may be one whose holder another container or machine hides.
STALE_SECONDS = 180.0

# NCCL's guide gives containers 1 GiB. One connection takes 9,637,888 bytes; in Docker's usual 64 MiB four ranks fail
# (NVIDIA/nccl #342, #525) while two may do (#1518).
SHARED_MEMORY_ENOUGH = GIB
SHARED_MEMORY_PER_RANK = 16 * MIB

# What Linux has given every process for decades, and what a few ranks with their shards and sockets are sure to need.
OPEN_FILES_ENOUGH = 1024

LOCK_CAPABILITY = 14  # CAP_IPC_LOCK in linux/capability.h
IN_MEMORY = ("tmpfs", "ramfs")


def check_requirements(profile: DsProfile, machine: Machine, ranks: int, torch_cuda: str | None) -> Iterator[Finding]:
    """Whether the machine has what the profile asks for: a card's kind, compilers, libraries, an NVMe folder."""
    missing = [
        from_sentence("profile", sentence)
        for sentence in missing_requirements(profile, profile.recompute, machine, ranks)
    ]
    if (profile.compiled_operators or profile.compile) and not _python_headers().exists():
        missing.append(
            problem(
                "profile",
                f"{profile.name} has code compiled, which needs Python's headers, and {_python_headers()} is missing.",
                "sudo apt install python3-dev",
            )
        )
    if machine.kind == "cuda" and profile.compiled_operators and (finding := _check_toolkit(torch_cuda)):
        missing.append(finding)
    built = f", and its first start builds {profile.compiled_operators}" if profile.compiled_operators else ""
    yield from missing or [ok("profile", f"{profile.name} asks for nothing that is missing{built}.")]


def _python_headers() -> Path:
    return Path(sysconfig.get_path("include")) / "Python.h"


def _check_toolkit(torch_cuda: str | None) -> Finding | None:
    """Whether the compiler for operators is of torch's CUDA: DeepSpeed refuses another one when it builds them ahead
    (op_builder/builder.py:804), and says nothing when it builds them at a run's start.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    compiler = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc") or str(USUAL_NVCC)
    try:
        told = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None  # that there is none is found elsewhere
    release = re.search(r"release (\d+)\.(\d+)", told)
    if not release or not torch_cuda or release[1] == torch_cuda.split(".")[0]:
        return None
    return warning(
        "profile",
        f"{compiler} is of CUDA {release[1]}.{release[2]}, torch was built with {torch_cuda}: the two may not "
        "go together.",
        f"Install the toolkit of CUDA {torch_cuda} and set CUDA_HOME to it.",
    )


def extensions_folder() -> Path:
    """Where torch builds operators (torch/utils/cpp_extension.py, get_default_build_root)."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else (Path(cache) if cache else Path.home() / ".cache") / "torch_extensions"


def check_build_locks(needed: bool) -> Iterator[Finding]:
    """Locks that a killed build has left behind: the next build waits for each of them without end and says nothing.

    The builder holds its lock open until the end (torch/utils/file_baton.py), so one that no process has open is
    abandoned. needed: whether the run will build anything.
    """
    folder = extensions_folder()
    locks = sorted(folder.rglob("lock")) if folder.is_dir() else []
    holders = _holders(locks)
    findings = []
    for lock in locks:
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            continue  # that build has just ended
        if lock in holders:
            findings.append(ok("build locks", f"{lock}: process {holders[lock]} is building."))
        elif age < STALE_SECONDS:
            findings.append(
                warning("build locks", f"{lock} is {age:.0f} s old and no process holds it.", f"In a while: rm {lock}")
            )
        elif file_system(folder) not in LOCAL_FILE_SYSTEMS:
            what = f"{lock} is {_duration(age)} old and no process of this machine holds it."
            findings.append(warning("build locks", what, f"If no other machine is building there: rm {lock}"))
        else:
            what = f"{lock} is {_duration(age)} old and no process holds it: the next build waits for it for ever."
            findings.append(problem("build locks", what, f"rm {lock}"))
    if needed and not os.access(nearest_folder(folder), os.W_OK):
        fix = "Set TORCH_EXTENSIONS_DIR to a folder that can be written to."
        findings.append(problem("build locks", f"{folder} is not writable, and operators are built there.", fix))
    yield from findings or [ok("build locks", f"None in {folder}.")]


def _holders(locks: list[Path]) -> dict[Path, int]:
    wanted = {str(lock.resolve()): lock for lock in locks}
    holders: dict[Path, int] = {}
    for process in psutil.process_iter() if wanted else ():
        try:
            opened = [file.path for file in process.open_files()]
        except (psutil.Error, OSError):
            continue  # another user's, or gone
        holders |= {wanted[path]: process.pid for path in opened if path in wanted}
    return holders


def check_shared_memory(ranks: int, cuda: bool, folder: Path = Path("/dev/shm")) -> Finding:
    """NCCL's ranks exchange through it where cards do not reach each other; gloo's do not use it."""
    if not cuda or ranks < 2:
        return ok("shared memory", f"Not needed with {'one card' if cuda else 'gloo'}.")
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    fix = "Start the container with --shm-size=1g (or --ipc=host), or remove what is left over in /dev/shm."
    text = f"{folder} has {free / MIB:,.0f} MiB free"
    if free < SHARED_MEMORY_PER_RANK * ranks:
        return problem("shared memory", f"{text}, too few for NCCL with {ranks} ranks.", fix)
    if free < SHARED_MEMORY_ENOUGH:
        return warning("shared memory", f"{text}; NCCL with {ranks} ranks may want up to 1 GiB.", fix)
    return ok("shared memory", f"{text}.")


def check_disk(out: Path, model: GPT2Config, dtype: str, keep: int) -> Iterator[Finding]:
    """Whether the checkpoints of a run below `out` have room, and whether they would outlive the next start."""
    place = nearest_folder(out)
    kind = file_system(place) or "of unknown kind"
    if kind in IN_MEMORY:
        what = f"{place} is a {kind}: it takes host memory, and checkpoints in it are gone when the machine restarts."
        yield warning("disk", what, "Choose a folder on a disk with --out.")
    if sentence := disk_problem(out, model, dtype, keep):
        yield from_sentence("disk", sentence)
        return
    free, needed = shutil.disk_usage(place).free, checkpoints_bytes(model, dtype, keep)
    yield ok(
        "disk", f"{free / GIB:.1f} GiB free in {out} ({kind}); checkpoints of {model.name} take {needed / GIB:.1f}."
    )


def check_host_memory(parts: dict[str, int], machine: Machine, model: GPT2Config) -> Finding:
    """Whether the host can hold what a run puts there. parts: bytes by name, of all ranks."""
    if sentence := host_memory_problem(parts, machine):
        return from_sentence("host memory", f"{model.name}: {sentence}")
    needed, available = sum(parts.values()), psutil.virtual_memory().available
    text = f"{model.name} needs {needed / GIB:.1f} GiB of {machine.host_memory_bytes / GIB:.1f}"
    if available < needed:
        what = f"{text}, and only {available / GIB:.1f} are available now."
        return warning("host memory", what, "End what holds the rest before the run.")
    return ok("host memory", f"{text}; {min(available, machine.host_memory_bytes) / GIB:.1f} are available now.")


def check_locked_memory(profile: DsProfile) -> Finding | None:
    """DeepSpeed's NVMe reader locks its buffers by mlock (csrc/pin_memory/page_alloc.cpp:24), under the user's limit.

    Buffers that CUDA pins are the driver's affair and not under it.
    """
    if not profile.pins_memory or "nvme" not in (profile.offload_optimizer, profile.offload_param):
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or _may_lock():
        return ok("locked memory", "Not limited.")
    return warning(
        "locked memory",
        f"ulimit -l allows {limit / MIB:.0f} MiB; the NVMe reader's buffers are locked and may need more.",
        "ulimit -l unlimited (in a container --ulimit memlock=-1).",
    )


def _may_lock() -> bool:
    """Whether this process has the capability that the limit does not bind; root in a container often lacks it."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> LOCK_CAPABILITY & 1)


def check_open_files() -> Finding:
    """Shards, sockets and logs are files."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < OPEN_FILES_ENOUGH:
        return warning("open files", f"ulimit -n allows {limit}.", "ulimit -n 4096")
    return ok("open files", "Not limited." if limit == resource.RLIM_INFINITY else f"{limit:,} allowed.")


def check_allocator(cuda: bool) -> Finding | None:
    """Whether the user's own setting of torch's allocator takes away the segments that grow."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not cuda or not given or any("expandable_segments:true" in value.lower() for value in given.values()):
        return None
    name, value = next(iter(given.items()))
    return warning(
        "allocator",
        f"{name}={value} keeps the allocator's segments fixed: up to 29% more is reserved than tensors need.",
        f"Add expandable_segments:True to it, or unset {name} (it is set for you).",
    )


def _duration(seconds: float) -> str:
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
