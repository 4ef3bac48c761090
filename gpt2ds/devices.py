"""What this machine has: GPUs by NVML, host memory, cores. Never imports torch and never starts CUDA."""

import contextlib
import importlib.util
import itertools
import math
import os
import platform
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2ds.errors import UserError

MIB = 2**20

# Dense peak rates in TFLOP/s with fp32 accumulation, as NVIDIA's data sheets and architecture white papers give them
# (16-bit tensor cores without sparsity; fp32 without TF32). The longest name that the device's own name contains
# counts.
PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    # name: (16 bit, fp32)
    "GeForce RTX 3080": (59.5, 29.8),
    "GeForce RTX 3090": (71.0, 35.6),
    "GeForce RTX 3090 Ti": (80.0, 40.0),
    "GeForce RTX 4070 Ti": (80.2, 40.1),
    "GeForce RTX 4080": (97.5, 48.7),
    "GeForce RTX 4090": (165.2, 82.6),
    "GeForce RTX 5080": (112.6, 56.3),
    "GeForce RTX 5090": (209.5, 104.8),
    "RTX A5000": (111.1, 27.8),
    "RTX A6000": (154.8, 38.7),
    "RTX 6000 Ada": (364.2, 91.1),
    "A10": (125.0, 31.2),
    "A10G": (70.0, 31.2),
    "A40": (149.7, 37.4),
    "A100": (312.0, 19.5),
    "L4": (121.0, 30.3),
    "L40": (181.0, 90.5),
    "L40S": (362.0, 91.6),
    "T4": (65.0, 8.1),
    "V100": (125.0, 15.7),
    "H100": (989.4, 66.9),
    "H100 PCIe": (756.0, 51.2),
    "H200": (989.4, 66.9),
}

# A process's own CUDA context, which NVML's free bytes do not yet lack: about 470 MiB on an RTX 4090.
CONTEXT_BYTES = 470 * MIB

# NCCL's buffers, outside of torch's allocator, of each rank when there are several. An assumption: not measured yet.
NCCL_BYTES = 400 * MIB

# What a card of N GB cannot give to one process's tensors: 24,576 MiB on the box of an RTX 4090, 23,700 MiB to reserve.
CARD_OVERHEAD_BYTES = (24_576 - 23_700) * MIB

# More than any card will have for long; what is far beyond it overflows.
LARGEST_CARD_GB = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class GPU:
    """One GPU as NVML describes it."""

    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int] | None = None
    nvml_index: int = 0
    """Its number among all GPUs of the machine, those that CUDA_VISIBLE_DEVICES hides included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What there is to train on."""

    cpu_name: str
    cores: int
    host_memory_bytes: int
    gpus: tuple[GPU, ...] = field(default=())

    @property
    def kind(self) -> str:
        """`cuda` when there are GPUs that the installed torch can use, else `cpu`."""
        return "cuda" if self.gpus else "cpu"

    def to_dict(self) -> dict[str, Any]:
        """For the log."""
        return {
            "cpu_name": self.cpu_name,
            "host_cores": self.cores,
            "host_memory_bytes": self.host_memory_bytes,
            "gpus": [{"name": gpu.name, "total_bytes": gpu.total_bytes} for gpu in self.gpus],
        }


def this_machine() -> Machine:
    """Looks at the machine; GPUs only when the installed torch can use them and DS_ACCELERATOR does not say cpu."""
    import psutil

    usable = os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch_has_cuda()
    return Machine(
        cpu_name=_cpu_name(),
        # The cores that this process may use, not those of the host: a container is often given fewer.
        cores=len(os.sched_getaffinity(0)),
        host_memory_bytes=int(min(psutil.virtual_memory().total, _container_limit_bytes())),
        gpus=_gpus() if usable else (),
    )


def torch_has_cuda() -> bool:
    """Whether the installed torch was built with CUDA, read from its version file: importing torch takes over a
    second.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version_file = Path(spec.origin).with_name("version.py")
    for line in version_file.read_text(encoding="utf-8").splitlines():
        if line.startswith("cuda"):
            return not line.rstrip().endswith("None")
    return False


def prepare_cuda() -> None:
    """Sets what must be set before CUDA starts, unless the user has: the allocator's segments, and the cards' order.

    CUDA itself counts the fastest card first, NVML goes by the bus: with unlike cards they would mean different ones.
    Torch's allocator is let grow its segments: fixed ones reserve up to 29% more than the tensors need, growing ones
    3 to 5% (a replay of gpt2_large's allocations through a model of the allocator).
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer name of the same setting
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The device's dense peak rate in FLOP/s for `fp32` or a 16-bit dtype; None for a device that the table does not
    know.
    """
    words = f" {device_name} "
    known = [name for name in PEAK_TFLOPS if f" {name} " in words.replace("-", " ") or f" {name}-" in words]
    if not known:
        return None
    sixteen_bit, fp32 = PEAK_TFLOPS[max(known, key=len)]
    return (fp32 if dtype == "fp32" else sixteen_bit) * 1e12


def card_bytes(card_gb: float) -> int:
    """What a card sold with so many GB offers to one process's tensors: 23,700 MiB for 24."""
    return int(card_gb * 1024 * MIB) - CARD_OVERHEAD_BYTES


def gpu_memory_problem(card_gb: float) -> str | None:
    """A sentence when a card of so many GB (--gpu-memory) makes no sense, else None."""
    if not 0 < card_gb <= LARGEST_CARD_GB:
        return f"--gpu-memory must be above 0 and at most {LARGEST_CARD_GB:,} GB, not {card_gb:g}."
    if card_bytes(card_gb) <= 0:
        return f"--gpu-memory {card_gb:g} GB leaves nothing for tensors: take 1 or more."
    return None


def ranks_here(ranks: int) -> int:
    """How many of a run's ranks are on this machine: torchrun's variable, DeepSpeed's, or all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_on_gpu(gpu: GPU) -> list[tuple[int, str, int | None]] | None:
    """(pid, program, bytes held or None where the driver does not say) of every process on a GPU, the largest first.

    None when NVML cannot tell.
    """
    import psutil
    import pynvml

    found: dict[int, int | None] = {}
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(gpu.nvml_index)
        for running in (
            *pynvml.nvmlDeviceGetComputeRunningProcesses(handle),
            *pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle),
        ):
            found[running.pid] = running.usedGpuMemory
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    rows = []
    for pid, held in found.items():
        try:
            name = psutil.Process(pid).name()
        except psutil.Error:  # in a container NVML's numbers are those of the host
            name = "unknown"
        rows.append((pid, name, held))
    return sorted(rows, key=lambda row: -(row[2] or 0))


def _gpus() -> tuple[GPU, ...]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library, no permission: NVML has an exception class for each
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        found = {}
        for index, handle in enumerate(handles):
            memory, name = pynvml.nvmlDeviceGetMemoryInfo(handle), pynvml.nvmlDeviceGetName(handle)
            gpu = GPU(
                name=name,
                total_bytes=int(memory.total),
                free_bytes=int(memory.free),
                compute_capability=pynvml.nvmlDeviceGetCudaComputeCapability(handle),
                nvml_index=index,
            )
            found[str(index)] = found[str(pynvml.nvmlDeviceGetUUID(handle))] = gpu
    finally:
        pynvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(found[str(index)] for index in range(len(handles)))
    wanted = [name.strip() for name in visible.split(",") if name.strip()]
    wanted = list(itertools.takewhile(lambda name: name != "-1", wanted))  # CUDA hides it and all that follow
    # CUDA takes the first letters of a UUID for the whole.
    chosen = [
        next(gpu for key, gpu in found.items() if key == name or (name.startswith("GPU-") and key.startswith(name)))
        for name in wanted
        if any(key == name or (name.startswith("GPU-") and key.startswith(name)) for key in found)
    ]
    if wanted and not chosen:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} names none of the {len(handles)} GPUs here: give their numbers from 0 on, "
            "or their UUIDs (MIG slices are not supported)."
        )
    return tuple(chosen)


def _container_limit_bytes() -> float:
    """What a container or a scheduler's job may use at most (control groups, both versions)."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return int(Path(path).read_text(encoding="ascii"))
    return math.inf


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
