"""The kernel's own account of a process's memory, phase by phase: an oracle in which no line of ours counts bytes.

It sees what no tensor tracker can: what a kernel of torch takes inside itself, and copies that are not tensors.
"""

import ctypes
import gc
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from gpt2ds.probe.live import PhasePeak

# glibc then maps every tensor on pages of its own and gives them back at once; the rest is one heap.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "16384",
    "MALLOC_MMAP_MAX_": "10000000",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
}
_DISABLE_HUGE_PAGES = 41  # PR_SET_THP_DISABLE, linux/prctl.h


def start_over_with_own_pages() -> None:
    """Starts this program once more, if it was not started so: malloc reads its settings only then."""
    if os.environ.get("MALLOC_ARENA_MAX") != MALLOC["MALLOC_ARENA_MAX"]:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    ctypes.CDLL(None).prctl(_DISABLE_HUGE_PAGES, 1, 0, 0, 0)


def resident_bytes(which: str = "VmRSS") -> int:
    """VmRSS, or VmHWM: the most since the last reset."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(lines[which].split()[0]) * 1024


class Pages:
    """Stands where LiveBytes stands, with its methods. What is resident when it is made is its zero."""

    def __init__(self) -> None:
        gc.collect()
        self.base_bytes = resident_bytes()
        self.phases: list[PhasePeak] = []

    def begin(self, name: str, _: str | None = None) -> None:
        """Ends the running phase and starts the next."""
        self.finish()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM := VmRSS (Linux, proc(5))
        self.phases.append(PhasePeak(name=name, peak_bytes=0))

    def finish(self) -> list[PhasePeak]:
        """Ends the last phase; all phases in order."""
        if self.phases:
            self.phases[-1].peak_bytes = resident_bytes("VmHWM") - self.base_bytes
            self.phases[-1].after_bytes = resident_bytes() - self.base_bytes
        return self.phases

    def label(self, tensors: Iterable[Tensor], name: str) -> None:
        """The kernel knows no names."""
