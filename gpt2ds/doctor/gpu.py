"""The doctor's checks of the cards: torch against the driver, which cards are seen, who holds them, how they reach each
other. By NVML and torch's version file; neither torch nor CUDA is started.
"""

import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from gpt2ds.devices import GPU, Machine, processes_on_gpu, this_machine
from gpt2ds.doctor.finding import Finding, from_sentence, ok, problem, warning
from gpt2ds.errors import UserError

GIB = 2**30

# The oldest driver for builds with any CUDA of this major version (NVIDIA, "CUDA Compatibility", table 1).
OLDEST_DRIVER = {11: "450", 12: "525", 13: "580"}

# What torch's packages are compiled for, by the CUDA they were built with: from 12.8 on Turing and newer with
# Blackwell, before it the older ones without (pytorch #172352, #190385).
BLACKWELL_SINCE_CUDA = (12, 8)
TURING, BLACKWELL = (7, 5), (10, 0)

# A desktop takes some hundred MiB of a card; from here on somebody computes.
BUSY_BYTES = GIB

# Cards without a way to each other: "GeForce cards do not support P2P" (a maintainer in NVIDIA/nccl-tests #287). Early
# drivers for Ada said that they had one, and NCCL hung (NVIDIA/nccl-tests #117; the README of
# tinygrad/open-gpu-kernel-modules says why); patched ones still do (noonghunna/club-3090 #873). A hang with driver 560
# was gone with 570 (dmlc/xgboost #11242). Where the driver says no, NCCL sees it by itself (NVIDIA/nccl #1637).
WITHOUT_PEERS = re.compile(r"GeForce RTX [45]0[0-9]0")
SETTLED_DRIVER = "570"


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchBuild:
    """The installed torch, as its version file tells."""

    version: str
    cuda: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Driver:
    """NVIDIA's driver and all cards of the machine; `error` when it is there and does not answer."""

    version: str = ""
    cuda: tuple[int, int] = (0, 0)
    cards: tuple[tuple[str, tuple[int, int]], ...] = ()
    """(name, compute capability) of each."""
    error: str = ""


def torch_build() -> TorchBuild | None:
    """What torch was built with, without importing it; None when there is none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__\s*=\s*'([^']*)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=\n]*=\s*'([\d.]+)'", text, re.MULTILINE)
    return TorchBuild(version=version[1] if version else "of unknown version", cuda=cuda[1] if cuda else None)


def nvidia_driver() -> Driver | None:
    """What NVML says; None when there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return None
    except pynvml.NVMLError as error:
        return Driver(error=str(error))
    try:
        version = str(pynvml.nvmlSystemGetDriverVersion())
        number = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        cards = tuple(
            (str(pynvml.nvmlDeviceGetName(handle)), tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)))
            for handle in handles
        )
    except pynvml.NVMLError as error:
        return Driver(error=str(error))
    finally:
        pynvml.nvmlShutdown()
    return Driver(version=version, cuda=(number // 1000, number % 1000 // 10), cards=cards)


def check_torch(build: TorchBuild | None, driver: Driver | None) -> Finding:
    """Whether this torch can use these cards with this driver."""
    if build is None:
        return problem("torch", "It is not installed.", "pip install torch")
    here = f"{build.version}, built {f'with CUDA {build.cuda}' if build.cuda else 'without CUDA'}"
    if driver is None or not (driver.cards or driver.error):
        if build.cuda:
            return warning(
                "torch",
                f"{here}; no NVIDIA driver or card is seen, so training would run on the CPU.",
                "Install NVIDIA's driver, or start the container with --gpus all.",
            )
        return ok("torch", f"{here}; no NVIDIA card is seen: training runs on the CPU.")
    if driver.error:
        return problem(
            "torch",
            f"{here}; the NVIDIA driver does not answer: {driver.error}.",
            "Restart the machine (after an update the loaded driver and its library differ) and look at nvidia-smi.",
        )
    names = ", ".join(f"{name} ({major}.{minor})" for name, (major, minor) in driver.cards)
    here += f"; driver {driver.version} for CUDA {driver.cuda[0]}.{driver.cuda[1]}; {names}"
    if build.cuda is None:
        return problem("torch", f"{here}: this torch cannot use a card.", "Install a torch that is built with CUDA.")
    cuda = _numbers(build.cuda)
    # Within a major version an older driver runs newer builds.
    if driver.cuda[0] < cuda[0]:
        oldest = OLDEST_DRIVER.get(cuda[0])
        update = f"Update the driver to {oldest} or newer" if oldest else "Update the driver"
        fix = f"{update}, or install a torch built with CUDA {driver.cuda[0]}."
        return problem("torch", f"{here}: the driver is too old for this torch.", fix)
    for name, capability in driver.cards:
        if cuda >= BLACKWELL_SINCE_CUDA and capability < TURING:
            return problem(
                "torch",
                f"{here}: this torch has no code for {name}.",
                "Install a torch built with CUDA 12.6, or take another card with CUDA_VISIBLE_DEVICES.",
            )
        if cuda < BLACKWELL_SINCE_CUDA and capability >= BLACKWELL:
            return problem(
                "torch", f"{here}: this torch has no code for {name}.", "Install a torch built with CUDA 12.8 or newer."
            )
    return ok("torch", f"{here}.")


def seen_machine() -> tuple[Machine, Finding | None]:
    """This machine; with all of its cards, and a problem, where CUDA_VISIBLE_DEVICES names none of them."""
    try:
        return this_machine(), None
    except UserError as error:
        hidden = os.environ.pop("CUDA_VISIBLE_DEVICES")
        try:
            return this_machine(), from_sentence("cards", str(error))
        finally:
            os.environ["CUDA_VISIBLE_DEVICES"] = hidden


def check_cards(machine: Machine, driver: Driver | None, usable: bool) -> Iterator[Finding]:
    """Which cards a run would see, and who holds their memory. usable: whether torch can use a card at all."""
    if driver is None or not driver.cards or not usable:
        return
    visible, accelerator = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("DS_ACCELERATOR", "cuda")
    if not machine.gpus:
        name = f"DS_ACCELERATOR={accelerator}" if accelerator != "cuda" else f"CUDA_VISIBLE_DEVICES={visible}"
        yield warning(
            "cards",
            f"{name} hides the {len(driver.cards)} here: training would run on the CPU.",
            f"unset {name.partition('=')[0]}",
        )
        return
    named = [name for name in (visible or "").split(",") if name.strip()]
    if len(named) > len(machine.gpus):
        yield warning(
            "cards",
            f"CUDA_VISIBLE_DEVICES={visible} names {len(named)}, and CUDA leaves out all from the first that is not "
            "here.",
            f"Name only cards that are here: their numbers are 0 to {len(driver.cards) - 1}.",
        )
    busy = [finding for gpu in machine.gpus if (finding := _check_held(gpu))]
    yield from busy or [ok("cards", f"{len(machine.gpus)} seen, none in use.")]


def _check_held(gpu: GPU) -> Finding | None:
    held = gpu.total_bytes - gpu.free_bytes
    if held < BUSY_BYTES:
        return None
    names = ", ".join(f"{name} (pid {pid})" for pid, name, _ in processes_on_gpu(gpu) or [])
    return warning(
        "cards",
        f"{gpu.name} number {gpu.nvml_index}: {held / GIB:.1f} of {gpu.total_bytes / GIB:.1f} GiB are held"
        f"{f' by {names}' if names else ', NVML does not say by whom'}.",
        "End what holds it, or choose other cards with CUDA_VISIBLE_DEVICES.",
    )


def peers(gpus: Sequence[GPU]) -> bool | None:
    """Whether the driver says that every two of these cards reach each other's memory; None when it does not say."""
    import pynvml

    both = (pynvml.NVML_P2P_CAPS_INDEX_READ, pynvml.NVML_P2P_CAPS_INDEX_WRITE)
    try:
        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(gpu.nvml_index) for gpu in gpus]
            return all(
                pynvml.nvmlDeviceGetP2PStatus(one, other, what) == pynvml.NVML_P2P_STATUS_OK
                for one, other in combinations(handles, 2)
                for what in both
            )
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def check_peers(gpus: Sequence[GPU], reached: bool | None) -> Finding | None:
    """How several cards reach each other. reached: what `peers` says of them."""
    if len(gpus) < 2:
        return None
    consumer = next((gpu.name for gpu in gpus if WITHOUT_PEERS.search(gpu.name)), None)
    if os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        if reached and not consumer:
            return warning(
                "peer-to-peer",
                "The cards reach each other directly, and NCCL_P2P_DISABLE forbids it: every exchange is slower.",
                "unset NCCL_P2P_DISABLE",
            )
        return ok("peer-to-peer", "Off by NCCL_P2P_DISABLE: the cards exchange through the host's memory.")
    if consumer and reached is not False:
        says = "the driver says that these cards have it" if reached else "the driver does not say"
        return warning(
            "peer-to-peer",
            f"{consumer} has no peer-to-peer, but {says}: NCCL may hang on it.",
            f"Update the driver to {SETTLED_DRIVER} or newer; if the all-reduce below fails, export "
            "NCCL_P2P_DISABLE=1.",
        )
    if reached:
        return ok("peer-to-peer", "The cards reach each other directly.")
    return ok("peer-to-peer", "None between these cards: NCCL exchanges through the host's memory.")


def _numbers(version: str) -> tuple[int, int]:
    major, minor = [*version.split("."), "0"][:2]
    return int(major), int(minor)
