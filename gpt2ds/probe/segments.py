"""The pools of PyTorch's CUDA caching allocator: free blocks, split and merged, in segments that come from the device.

The rules are those of PyTorch 2.13, c10/cuda/CUDACachingAllocator.cpp with the sizes of c10/core/AllocatorConfig.h.
"""

from bisect import bisect_left, insort

MIB = 2**20

# c10/core/AllocatorConfig.h: kMinBlockSize, kSmallSize, kSmallBuffer, large_segment_size_, kMinLargeAlloc, kRoundLarge.
BLOCK_BYTES = 512
SMALL_BYTES = MIB
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
OWN_SEGMENT_BYTES = 10 * MIB
OWN_SEGMENT_ROUNDING = 2 * MIB

# Addresses are free of charge: CUDA reserves more of them than there is memory.
ADDRESS_SPACE = 2**60


class Block:
    """A piece of a segment: in use, free, or (in an expandable segment) addresses without memory."""

    __slots__ = ("address", "after", "before", "mapped", "pool", "size", "used")

    def __init__(self, pool: "Pool", address: int, size: int, *, mapped: bool = True) -> None:
        self.pool, self.address, self.size, self.mapped = pool, address, size, mapped
        self.used = False
        self.before: Block | None = None
        self.after: Block | None = None

    def split(self, size: int) -> "Block":
        """Keeps the first bytes; returns the rest, its neighbour from now on."""
        rest = Block(self.pool, self.address + size, self.size - size, mapped=self.mapped)
        rest.before, rest.after = self, self.after
        if self.after:
            self.after.before = rest
        self.after, self.size = rest, size
        return rest


class Device:
    """Memory that is reserved in whole segments or pages."""

    def __init__(self, cap_bytes: int | None) -> None:
        self.cap_bytes = cap_bytes
        self.reserved_bytes = self.peak_bytes = 0

    def reserve(self, size: int) -> bool:
        if self.cap_bytes is not None and self.reserved_bytes + size > self.cap_bytes:
            return False
        self.reserved_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)
        return True


class Pool:
    """The small or the large blocks, in segments of fixed size: what cudaMalloc gives."""

    def __init__(self, device: Device, *, small: bool) -> None:
        self.device, self.small = device, small
        self.cached: list[tuple[int, int, Block]] = []
        """Free blocks by (size, address)."""
        self.next_address = 0

    def best_fit(self, size: int) -> Block | None:
        """Takes the smallest free block of at least this size, the lowest of several (PyTorch: get_free_block)."""
        index = bisect_left(self.cached, (size,))
        return self.cached.pop(index)[2] if index < len(self.cached) else None

    def grow(self, size: int) -> Block | None:
        """A new segment; None when the device has no room for it (PyTorch: get_allocation_size, alloc_block)."""
        if self.small:
            segment = SMALL_SEGMENT_BYTES
        elif size < OWN_SEGMENT_BYTES:
            segment = LARGE_SEGMENT_BYTES
        else:
            segment = rounded(size, OWN_SEGMENT_ROUNDING)
        if not self.device.reserve(segment):
            return None
        # Where cudaMalloc puts it is not known; only equal sizes are told apart by it.
        self.next_address += segment
        return Block(self, self.next_address - segment, segment)

    def splits(self, rest: int) -> bool:
        """Whether a block is cut where so much is left over (PyTorch: should_split)."""
        return rest >= BLOCK_BYTES if self.small else rest > SMALL_BYTES

    def release(self) -> None:
        """Gives back every segment that is free as a whole (PyTorch: release_blocks)."""
        kept = [entry for entry in self.cached if entry[2].before or entry[2].after]
        self.device.reserved_bytes -= sum(entry[0] for entry in self.cached) - sum(entry[0] for entry in kept)
        self.cached = kept

    def keep(self, block: Block) -> None:
        """Puts a block that is free now among the others, one with those beside it (PyTorch: try_merge_blocks)."""
        self.merge(block)
        self.insert(block)

    def insert(self, block: Block) -> None:
        insort(self.cached, (block.size, block.address, block))

    def forget(self, block: Block) -> None:
        """Takes out a block that is no longer free, or no longer there."""
        self.cached.pop(bisect_left(self.cached, (block.size, block.address)))

    def merge(self, block: Block) -> None:
        """Makes one of a block and its neighbours of the same kind, which are taken out of their lists."""
        before, after = block.before, block.after
        if before and not before.used and before.mapped == block.mapped:
            self.forget(before)
            block.address, block.size, block.before = before.address, before.size + block.size, before.before
            if block.before:
                block.before.after = block
        if after and not after.used and after.mapped == block.mapped:
            self.forget(after)
            block.size, block.after = block.size + after.size, after.after
            if block.after:
                block.after.before = block


class ExpandablePool(Pool):
    """The same in one segment that grows: only pages in use have memory behind their addresses.

    Each pool has one such segment (PyTorch: find_expandable_block).
    """

    def __init__(self, device: Device, *, small: bool) -> None:
        super().__init__(device, small=small)
        self.page_bytes = SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES
        self.holes: list[tuple[int, Block]] = [(0, Block(self, 0, ADDRESS_SPACE, mapped=False))]
        """Addresses without memory, in order."""

    def best_fit(self, size: int) -> Block | None:
        """As in fixed segments, but a block before a hole counts with the hole, which it can grow into."""
        index = bisect_left(self.cached, (size,))
        if index == len(self.cached):
            return None
        while index + 1 < len(self.cached) and _room(self.cached[index + 1][2]) < _room(self.cached[index][2]):
            index += 1
        return self.cached.pop(index)[2]

    def grow(self, size: int) -> Block | None:
        """Maps pages at the lowest address where free blocks and holes make up the size; None when there are none.

        Pages that were mapped before that stay mapped (PyTorch: try_allocate_expandable_block).
        """
        block = self._lowest(size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            hole = block.after
            assert hole is not None and not hole.mapped
            if not self._map(hole, min(size - block.size, hole.size)):
                return None
            block = hole  # now one with the block before it
        self.forget(block)
        return block

    def splits(self, rest: int) -> bool:
        return rest >= BLOCK_BYTES

    def release(self) -> None:
        """Takes the memory from all pages that are free as a whole (PyTorch: unmap_block)."""
        for size, address, block in list(self.cached):
            first, end = rounded(address, self.page_bytes), (address + size) // self.page_bytes * self.page_bytes
            if first >= end:
                continue
            self.forget(block)
            hole = block
            if first > address:
                hole = block.split(first - address)
                self.insert(block)
            if end < address + size:
                rest = hole.split(end - first)
                self.insert(rest)
            self.device.reserved_bytes -= hole.size
            hole.mapped = False
            self.merge(hole)
            insort(self.holes, (hole.address, hole))

    def forget(self, block: Block) -> None:
        if block.mapped:
            super().forget(block)
        else:
            self.holes.pop(bisect_left(self.holes, (block.address,)))

    def _lowest(self, size: int) -> Block:
        for _, hole in self.holes:
            start = hole.before if hole.before and not hole.before.used else hole
            room, block = 0, start
            while room < size and not block.used:
                room += block.size
                if block.after is None:
                    break
                block = block.after
            if room >= size:
                return start
        raise AssertionError("the last hole has no end")

    def _map(self, hole: Block, size: int) -> bool:
        """Gives memory to the first pages of a hole, which becomes a free block (PyTorch: map_block)."""
        size = rounded(size, self.page_bytes)
        if not self.device.reserve(size):
            return False
        self.forget(hole)
        if size < hole.size:
            rest = hole.split(size)
            insort(self.holes, (rest.address, rest))
        hole.mapped = True
        self.keep(hole)
        return True


def rounded(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def _room(block: Block) -> int:
    return block.size + (block.after.size if block.after and not block.after.mapped else 0)
