"""What a profile asks of the machine: processors, libraries, compilers, host memory, disk. Found before the run,
because DeepSpeed finds out in the middle of a start, each rank with a traceback of its own.
"""

import importlib.util
import os
import shlex
import shutil
from collections.abc import Iterator
from ctypes.util import find_library
from pathlib import Path

from gpt2ds.devices import Machine
from gpt2ds.ds_profile import DsProfile
from gpt2ds.ds_rules import section
from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.memory.setting import DTYPE_BYTES

GIB = 2**30

USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")  # where torch looks when nothing else is said


def missing_requirements(profile: DsProfile, recompute: str, machine: Machine, ranks_here: int) -> list[str]:
    """What this machine lacks for the profile under a recompute policy on so many ranks, a sentence each."""
    on_cpu = machine.kind == "cpu"
    return [
        *_processors(profile, recompute, machine, ranks_here),
        *_compilers(profile, on_cpu),
        *_libraries(profile),
        *_nvme(profile),
    ]


def _processors(profile: DsProfile, recompute: str, machine: Machine, ranks_here: int) -> Iterator[str]:
    if profile.dtype == "fp16" and machine.kind == "cpu":
        yield (
            f"{profile.name} trains in fp16, which needs a CUDA GPU: take the bf16 profile of the same stage "
            f"(zero{profile.zero_stage}.json), which also runs on a CPU."
        )
    # torch calls bf16 supported on older cards as well, and emulates it.
    old = [gpu.name for gpu in machine.gpus if (gpu.compute_capability or (8, 0)) < (8, 0)]
    if profile.dtype == "bf16" and old:
        yield (
            f"{profile.name} trains in bf16, which {old[0]} has no hardware for: take zero2_fp16.json or "
            "zero3_fp16.json."
        )
    if recompute == "host" and machine.kind == "cpu":
        yield "The recompute policy host moves activations from a GPU to the host: on a CPU take full."
    gpus = len(machine.gpus)
    if gpus and ranks_here > gpus:
        yield (
            f"{ranks_here} ranks on this machine but {gpus} GPU{'s' * (gpus > 1)}: start at most {gpus} "
            f"(--num_gpus {gpus})."
        )


def _compilers(profile: DsProfile, on_cpu: bool) -> Iterator[str]:
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if profile.compile and not (shutil.which(compiler) or shutil.which("gcc")):
        yield f"{profile.name} asks for torch.compile, which needs a C++ compiler: sudo apt install g++."
    operators = profile.compiled_operators
    if not operators:
        return
    if not shutil.which(compiler):
        yield f"{profile.name} needs {operators}, which needs a C++ compiler to be built: sudo apt install g++."
    if not shutil.which("ninja"):
        yield f"{profile.name} needs {operators}, which needs ninja to be built: pip install ninja."
    # Adam for the CPU is plain C++, on a CUDA machine as well.
    for_cuda = not on_cpu and not profile.offload_optimizer
    toolkit = shutil.which("nvcc") or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if for_cuda and not toolkit and not USUAL_NVCC.exists():
        yield (
            f"{profile.name} needs {operators}, which needs nvcc to be built: install the CUDA toolkit of your "
            "torch's version and set CUDA_HOME."
        )


def _libraries(profile: DsProfile) -> Iterator[str]:
    if profile.eight_bit_states and importlib.util.find_spec("bitsandbytes") is None:
        yield f"{profile.name} keeps Adam's moments in 8 bits with bitsandbytes: pip install bitsandbytes."


def _nvme(profile: DsProfile) -> Iterator[str]:
    for what, device in (("optimizer", profile.offload_optimizer), ("param", profile.offload_param)):
        if device != "nvme":
            continue
        folder = Path(section(profile.settings, f"zero_optimization.offload_{what}")["nvme_path"])
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            yield (
                f"offload_{what}.nvme_path {folder} is not a folder that can be written to: create it on the NVMe disk "
                "or name another."
            )
    # The library alone is not enough: the reader is compiled. Headers may lie where the compiler's variables say.
    own_paths = any(name in os.environ for name in ("CFLAGS", "CPATH", "CPLUS_INCLUDE_PATH"))
    has_aio = find_library("aio") and (own_paths or Path("/usr/include/libaio.h").exists())
    if "nvme" in (profile.offload_optimizer, profile.offload_param) and not has_aio:
        yield f"{profile.name} offloads to NVMe, which needs libaio: sudo apt install libaio-dev."


def host_memory_problem(parts: dict[str, int], machine: Machine) -> str | None:
    """A sentence when the host's memory cannot hold these parts (`memory.host.predict_host`), else None."""
    needed = sum(parts.values())
    if needed <= machine.host_memory_bytes:
        return None
    largest = sorted(parts.items(), key=lambda part: -part[1])[:4]
    named = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    if machine.kind == "cpu":
        fix = "a smaller --model or --micro-batch, or fewer ranks"
    elif "moments" in parts:
        fix = 'a smaller --model, fewer ranks on this machine, or "pin_memory": false in the profile'
    else:
        fix = "a smaller --model, or fewer ranks on this machine"
    return (
        f"This run needs {needed / GIB:.1f} GiB of host memory ({named}), this machine has "
        f"{machine.host_memory_bytes / GIB:.1f}: take {fix}."
    )


def checkpoint_bytes(model: GPT2Config, dtype: str) -> int:
    """The size of one checkpoint: weights for inference, fp32 master weights and two moments."""
    return model.parameters * (DTYPE_BYTES[dtype] + 12)


def checkpoints_bytes(model: GPT2Config, dtype: str, keep: int) -> int:
    """The most that a run's checkpoints take at a time: the newest, the best, and the one being written."""
    return checkpoint_bytes(model, dtype) * (keep + 2)


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is already there."""
    while not path.exists():
        path = path.parent
    return path


def disk_problem(folder: Path, model: GPT2Config, dtype: str, keep: int) -> str | None:
    """A sentence when the checkpoints that will be kept in a run folder, and the one being written, lack room."""
    one, needed = checkpoint_bytes(model, dtype), checkpoints_bytes(model, dtype, keep)
    # A resumed run's own checkpoints make room as new ones come.
    present = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    place = nearest_folder(folder)
    if not os.access(place, os.W_OK):
        return f"{place} is not writable: choose another folder with --out."
    free = shutil.disk_usage(place).free + present
    if free >= needed:
        return None
    return (
        f"{folder} has room for {free / GIB:.1f} GiB, but {keep} checkpoints of {one / GIB:.1f} GiB, the best one and "
        f"the next one need {needed / GIB:.1f}: choose another --out, or a smaller --keep."
    )
