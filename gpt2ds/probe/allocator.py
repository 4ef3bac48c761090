"""A trace's allocations replayed through a model of PyTorch's CUDA caching allocator: what it reserves from the device.

The rules are those of PyTorch 2.13, c10/cuda/CUDACachingAllocator.cpp; not yet compared with a
GPU.

In a trace's events is everything from the engine's start on: weights as they arrive on the device (the trainer builds
the model on the CPU, and the engine moves it one tensor at a time, in the same order), start-up and every step, with
the streams on which ZeRO-3 gathers and overlap_comm reduces, and the times when DeepSpeed empties the cache. Not in
them: cuBLAS's workspaces, which `replay` adds; that a block which another stream still reads stays in use a little
longer; evaluation; and what is outside of this allocator, CUDA's context and NCCL.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gpt2ds.memory.setting import CUBLAS_WORKSPACE_BYTES
from gpt2ds.probe.segments import BLOCK_BYTES, SMALL_BYTES, Block, Device, ExpandablePool, Pool, rounded


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """What the allocator's own counters would show."""

    peak_allocated_bytes: int
    """torch.cuda.max_memory_allocated: blocks in use, with what their sizes are rounded up to."""
    peak_reserved_bytes: int
    """torch.cuda.max_memory_reserved."""
    retries: int
    """How often all cached memory went back to the device to satisfy a request."""
    fits: bool
    """False: a request could not be met, and the replay ended there."""


def replay(
    events: Iterable[tuple[int, int]],
    *,
    expandable_segments: bool,
    cap_bytes: int | None = None,
    streams: Mapping[int, int] = MappingProxyType({}),
    workspaces: Iterable[int] = (CUBLAS_WORKSPACE_BYTES // 2,) * 2,
) -> Replay:
    """Replays (number, bytes) for an allocation, (number, 0) when it is freed and (0, 0) when the cache is emptied.

    So `Trace.events` has them. streams: as `Trace.streams`, those not on the default stream. cap_bytes: what the device
    has for this allocator; None for no end of it. workspaces: taken first and kept, by default cuBLAS's for the forward
    thread and that of autograd, which take theirs with their first product.
    """
    allocator = Allocator(expandable_segments=expandable_segments, cap_bytes=cap_bytes)
    live: dict[int, Block] = {}
    fits = True
    try:
        for size in workspaces:
            allocator.allocate(size)
        for number, size in events:
            if size:
                live[number] = allocator.allocate(size, streams.get(number, 0))
            elif number:
                allocator.free(live.pop(number))
            else:
                allocator.empty_cache()
    except OutOfMemoryError:
        fits = False
    return Replay(
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_reserved_bytes=allocator.device.peak_bytes,
        retries=allocator.retries,
        fits=fits,
    )


class OutOfMemoryError(Exception):
    """The device has no more memory, even after everything cached went back to it."""


class Allocator:
    """One device's allocator: sizes rounded, blocks reused, split and merged, segments reserved and kept."""

    def __init__(self, *, expandable_segments: bool, cap_bytes: int | None = None) -> None:
        self.device = Device(cap_bytes)
        self.kind = ExpandablePool if expandable_segments else Pool
        self.pools: dict[tuple[int, bool], Pool] = {}
        """By stream and whether they are for small blocks."""
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.retries = 0

    def pool(self, stream: int, *, small: bool) -> Pool:
        """Blocks are reused only on the stream that they were made for."""
        if (stream, small) not in self.pools:
            self.pools[stream, small] = self.kind(self.device, small=small)
        return self.pools[stream, small]

    def allocate(self, size: int, stream: int = 0) -> Block:
        """A block of at least `size` bytes; raises OutOfMemoryError (PyTorch: malloc, alloc_found_block)."""
        size = rounded(size, BLOCK_BYTES)
        pool = self.pool(stream, small=size <= SMALL_BYTES)
        block = pool.best_fit(size) or pool.grow(size)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = pool.grow(size)
            if block is None:
                raise OutOfMemoryError
        if pool.splits(block.size - size):
            pool.insert(block.split(size))
        block.used = True
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block) -> None:
        """Keeps the block's memory for the next request (PyTorch: free_block)."""
        block.used = False
        self.allocated_bytes -= block.size
        block.pool.keep(block)

    def empty_cache(self) -> None:
        """Gives back to the device what is free as a whole, on every stream."""
        for pool in self.pools.values():
            pool.release()
