"""`gpt2ds memory-estimate --trace`: the estimates again, from the real engine on meta tensors instead of the formula.

Whether a setting fits is decided on what the caching allocator reserves for it, with expandable segments as the trainer
sets them (devices.prepare_cuda), in a replay under the card's limit.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from gpt2ds.ds_profile import DsProfile
from gpt2ds.estimate.rows import Estimates, Row
from gpt2ds.gpt2.config import with_context
from gpt2ds.probe.allocator import replay
from gpt2ds.probe.meta_engine import Phase, Trace, TraceRequest, trace

# In the second micro-batch of a step the sums of the first are there as well; every further one is like it. (Traced
# with 3 instead of 2: the same peaks to the byte for ZeRO-0 to ZeRO-3, offload, fp16 and bf16 states.)
TRACED_ACCUMULATION = 2

WORKSPACE = "workspace"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reserved:
    """Most bytes that the caching allocator takes from a card that is large enough."""

    fixed_bytes: int
    """With PyTorch's default, segments of fixed size."""
    expandable_bytes: int
    """With PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, as the trainer sets it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """What the last rank's GPU holds in the second optimizer step, byte for byte; cuBLAS's workspaces are added."""

    peak_bytes: int
    phase: str
    parts: dict[str, int]
    phases: tuple[Phase, ...]
    difference_percent: float
    """Of the formula's peak from this one."""
    accumulation: int
    """Micro-batches of the traced steps: more than TRACED_ACCUMULATION peak no higher."""
    reserved: Reserved
    fits: bool
    retries: int
    """How often the allocator empties its cache to stay below the card's limit; each one makes a step slower."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedRow:
    """A row of the estimates, and its trace or the reason why there is none."""

    row: Row
    traced: Traced | None
    why_not: str = ""

    @property
    def fits(self) -> bool:
        """By the trace; by the formula where there is none."""
        return self.row.fits if self.traced is None else self.traced.fits

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"traced": None, "why_not": self.why_not} if self.traced is None else asdict(self.traced)


def traced_rows(estimates: Estimates, *, cores: int, done: Callable[[], None] = lambda: None) -> tuple[TracedRow, ...]:
    """Traces every row of the estimates, `cores` at a time in a process of its own each; in their order.

    done: called whenever one is finished. A trace takes 10 seconds or more and 400 MB of host memory.
    """

    def one(row: Row) -> TracedRow:
        try:
            if why_not := _untraceable(row.source):
                return TracedRow(row=row, traced=None, why_not=why_not)
            return TracedRow(row=row, traced=_traced(row, estimates.room_bytes))
        except RuntimeError as error:  # of the other process: the other rows are still worth having
            return TracedRow(row=row, traced=None, why_not=_last_line(error))
        finally:
            done()

    with ThreadPoolExecutor(max(1, cores)) as threads:
        return tuple(threads.map(one, estimates.rows))


def to_dict(estimates: Estimates, rows: tuple[TracedRow, ...]) -> dict[str, Any]:
    """For --json: what `Estimates.to_dict` has, and "trace" in each row."""
    result = estimates.to_dict()
    result["source"] += "; trace: DeepSpeed's engine on meta tensors, last rank, not measured on a GPU"
    for given, row in zip(result["rows"], rows, strict=True):
        given["trace"] = row.to_dict()
    return result


def _untraceable(profile: DsProfile) -> str:
    if profile.eight_bit_states:
        return "bitsandbytes keeps its 8-bit states by kernels of its own, which know no meta tensors"
    if profile.compile:
        return "torch.compile decides by itself what a block keeps, and is not traced"
    if "nvme" in (profile.offload_optimizer, profile.offload_param):
        return "offload to NVMe would write real files"
    return ""


def _traced(row: Row, room_bytes: int) -> Traced:
    setting = row.setting
    accumulation = min(setting.accumulation, TRACED_ACCUMULATION)
    batch = {"micro_batch": setting.micro_batch, "accumulation": accumulation, "ranks": setting.ranks}
    request = TraceRequest(
        model=with_context(setting.model, setting.context),
        ds_config=row.source.ds_config(**batch),
        ranks=setting.ranks,
        recompute=setting.recompute,
        loss_chunk=setting.loss_chunk,
        log_events=True,
    )
    started = time.monotonic()
    seen = trace(request)
    seconds = time.monotonic() - started
    workspace = setting.workspace_bytes
    phases = tuple(_with_workspace(phase, workspace) for phase in seen.phases)
    peak = max(phases, key=lambda phase: phase.peak_bytes)
    return Traced(
        peak_bytes=peak.peak_bytes,
        phase=peak.name,
        parts=peak.parts,
        phases=phases,
        difference_percent=round(100 * (row.peak_bytes / peak.peak_bytes - 1), 3),
        accumulation=accumulation,
        seconds=round(seconds, 1),
        **_replayed(seen, room_bytes, workspace),
    )


def _replayed(seen: Trace, room_bytes: int, workspace_bytes: int) -> dict[str, Any]:
    # One workspace for the forward pass's thread, one for autograd's.
    again = partial(replay, seen.events, streams=seen.streams, workspaces=(workspace_bytes // 2,) * 2)
    fixed = again(expandable_segments=False)
    expandable = again(expandable_segments=True)
    capped = again(expandable_segments=True, cap_bytes=room_bytes)
    reserved = Reserved(fixed_bytes=fixed.peak_reserved_bytes, expandable_bytes=expandable.peak_reserved_bytes)
    return {"reserved": reserved, "fits": capped.fits, "retries": capped.retries}


def _with_workspace(phase: Phase, workspace_bytes: int) -> Phase:
    return Phase(
        # All phases are of the last traced step, whichever that is.
        name=phase.name.split(" ", 2)[2],
        peak_bytes=phase.peak_bytes + workspace_bytes,
        operation=phase.operation,
        after_bytes=phase.after_bytes + workspace_bytes,
        parts=phase.parts | {WORKSPACE: workspace_bytes},
    )


def _last_line(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
    return f"the trace failed: {lines[-1]}" if lines else "the trace failed without a word"
