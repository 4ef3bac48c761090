"""The caching allocator's model: each rule by a short sequence whose answer follows from PyTorch's source."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2ds.memory.setting import CUBLAS_WORKSPACE_BYTES
from gpt2ds.probe.allocator import Allocator, OutOfMemoryError, replay
from gpt2ds.probe.segments import Block, Pool

KIB, MIB = 2**10, 2**20
FIXED, EXPANDABLE = False, True
both = pytest.mark.parametrize("expandable", [FIXED, EXPANDABLE], ids=["fixed", "expandable"])


def reserved(expandable: bool, *sizes: int) -> int:
    allocator = Allocator(expandable_segments=expandable)
    for size in sizes:
        allocator.allocate(size)
    return allocator.device.reserved_bytes


def large(allocator: Allocator) -> Pool:
    return allocator.pool(0, small=False)


@both
def test_sizes_are_rounded_to_512_bytes(expandable: bool) -> None:
    allocator = Allocator(expandable_segments=expandable)
    assert [allocator.allocate(size).size for size in (1, 512, 513, MIB - 1)] == [512, 512, 1024, MIB]
    assert allocator.allocated_bytes == 512 + 512 + 1024 + MIB


def test_segments_by_size() -> None:
    assert reserved(FIXED, 1) == 2 * MIB
    assert reserved(FIXED, MIB, MIB) == 2 * MIB  # two of them share one
    assert reserved(FIXED, MIB + 1) == 20 * MIB
    assert reserved(FIXED, *[10 * MIB - 512] * 2) == 20 * MIB
    assert reserved(FIXED, 10 * MIB) == 10 * MIB
    assert reserved(FIXED, 10 * MIB + 1) == 12 * MIB
    assert reserved(FIXED, MIB, 2 * MIB) == 22 * MIB  # small and large ones never share


def test_expandable_segments_grow_by_pages() -> None:
    assert reserved(EXPANDABLE, 1) == 2 * MIB
    assert reserved(EXPANDABLE, *[MIB] * 3) == 4 * MIB
    assert reserved(EXPANDABLE, MIB + 1) == 20 * MIB
    assert reserved(EXPANDABLE, 21 * MIB) == 40 * MIB
    # What is left of the last page is used: the second block needs one more page, not two.
    assert reserved(EXPANDABLE, 21 * MIB, 21 * MIB) == 60 * MIB


def test_a_small_remainder_of_a_large_block_is_not_split() -> None:
    for requested, given_bytes in ((12 * MIB - 512, 12 * MIB), (11 * MIB, 12 * MIB), (11 * MIB - 512, 11 * MIB - 512)):
        allocator = Allocator(expandable_segments=FIXED)
        assert allocator.allocate(requested).size == given_bytes
        assert allocator.allocated_bytes == given_bytes
    assert Allocator(expandable_segments=EXPANDABLE).allocate(12 * MIB - 512).size == 12 * MIB - 512
    small = Allocator(expandable_segments=FIXED)
    assert [small.allocate(size).size for size in (MIB, MIB - 512, 512)] == [MIB, MIB - 512, 512]
    assert small.device.reserved_bytes == 2 * MIB


@both
def test_neighbours_merge_when_free(expandable: bool) -> None:
    allocator = Allocator(expandable_segments=expandable)
    first, second, third = (allocator.allocate(6 * MIB) for _ in range(3))
    allocator.free(first)
    allocator.free(third)
    assert [entry[0] for entry in large(allocator).cached] == [6 * MIB, 8 * MIB]  # the third, with the segment's rest
    allocator.free(second)
    assert [entry[0] for entry in large(allocator).cached] == [20 * MIB]
    assert allocator.allocate(18 * MIB).address == first.address
    assert allocator.device.reserved_bytes == 20 * MIB


@both
def test_the_smallest_block_that_is_large_enough_is_taken(expandable: bool) -> None:
    allocator = Allocator(expandable_segments=expandable)
    blocks = [allocator.allocate(size * MIB) for size in (40, 2, 26, 2, 30, 2, 26, 2)]
    for index in (0, 2, 4, 6):
        allocator.free(blocks[index])
    reserved_before = allocator.device.reserved_bytes
    assert allocator.allocate(25 * MIB).address == blocks[2].address  # the lowest of the two of 26 MiB
    assert allocator.allocate(25 * MIB).address == blocks[6].address
    assert allocator.allocate(25 * MIB).address == blocks[4].address
    assert allocator.allocate(25 * MIB).address == blocks[0].address
    assert allocator.device.reserved_bytes == reserved_before


def test_a_block_that_could_grow_is_left_for_what_needs_it() -> None:
    allocator = Allocator(expandable_segments=EXPANDABLE)
    hole, _ = allocator.allocate(15 * MIB), allocator.allocate(12 * MIB)
    allocator.free(hole)
    # Free now: 15 MiB below, and 13 MiB at the end that can grow without limit.
    assert allocator.allocate(12 * MIB).address == hole.address


# Each half of the memory in blocks of 30 MiB, every other one freed, then a block of 60: there are no two neighbours.
FRAGMENTING = [
    *((n, 30 * MIB) for n in range(1, 11)),
    *((n, 0) for n in range(1, 11, 2)),
    (11, 60 * MIB),
    (12, 60 * MIB),
]


def test_fragmentation() -> None:
    # Without a cap both take more: no free block is large enough.
    for expandable, more in ((FIXED, 420), (EXPANDABLE, 420)):
        seen = replay(FRAGMENTING, expandable_segments=expandable, workspaces=())
        assert (seen.peak_reserved_bytes, seen.retries, seen.fits) == (more * MIB, 0, True)
    # Sizes that grow: a fixed segment of 30 MiB cannot become one of 40, an expandable one can.
    growing = [event for n in range(3, 20) for event in ((n, n * 10 * MIB), (n, 0))]
    assert replay(growing, expandable_segments=FIXED, workspaces=()).peak_reserved_bytes == sum(range(3, 20)) * 10 * MIB
    assert replay(growing, expandable_segments=EXPANDABLE, workspaces=()).peak_reserved_bytes == 200 * MIB
    # Under a cap fixed segments of which a part is in use cannot go back, pages can.
    parts = [
        event for n in range(4) for event in ((1 + n, 60 * MIB), (1 + n, 0), (1 + n, 20 * MIB), (100 + n, 40 * MIB))
    ]
    parts += [*((100 + n, 0) for n in range(4)), (200, 100 * MIB)]
    fixed = replay(parts, expandable_segments=FIXED, cap_bytes=260 * MIB, workspaces=())
    expandable = replay(parts, expandable_segments=EXPANDABLE, cap_bytes=260 * MIB, workspaces=())
    assert not fixed.fits
    assert expandable.fits and expandable.retries == 1
    assert expandable.peak_reserved_bytes <= 260 * MIB


@both
def test_cached_memory_goes_back_before_memory_is_out(expandable: bool) -> None:
    events = [(1, 60 * MIB), (2, 40 * MIB), (1, 0), (3, 80 * MIB)]
    free = replay(events, expandable_segments=expandable, workspaces=())
    assert (free.retries, free.fits, free.peak_allocated_bytes) == (0, True, 120 * MIB)
    # Fixed: the segment of 60 MiB goes back. Expandable: so do its pages, and 80 are mapped behind the 40.
    capped = replay(events, expandable_segments=expandable, cap_bytes=120 * MIB, workspaces=())
    assert (capped.retries, capped.fits, capped.peak_reserved_bytes) == (1, True, 120 * MIB)
    short = replay(events, expandable_segments=expandable, cap_bytes=119 * MIB, workspaces=())
    assert (short.retries, short.fits, short.peak_allocated_bytes) == (1, False, 100 * MIB)
    # What small blocks held serves large ones, and the other way round.
    small = [*((n, MIB) for n in range(1, 21)), *((n, 0) for n in range(1, 21))]
    assert replay([*small, (30, 20 * MIB)], expandable_segments=expandable, cap_bytes=20 * MIB, workspaces=()).fits
    assert replay(
        [(30, 20 * MIB), (30, 0), *small], expandable_segments=expandable, cap_bytes=20 * MIB, workspaces=()
    ).fits


def test_only_whole_free_pages_are_unmapped_and_their_holes_are_filled_first() -> None:
    allocator = Allocator(expandable_segments=EXPANDABLE, cap_bytes=100 * MIB)
    first, _, last = (allocator.allocate(size * MIB) for size in (50, 5, 45))
    allocator.free(first)
    allocator.empty_cache()
    assert allocator.device.reserved_bytes == 60 * MIB  # 40 of the 50: the third page holds other blocks as well
    assert [(entry[0], entry[1]) for entry in large(allocator).cached] == [(10 * MIB, 40 * MIB)]
    # 25 MiB lie in the hole at the very start, though there are addresses without end.
    assert allocator.allocate(25 * MIB).address == 0
    assert allocator.device.reserved_bytes == 100 * MIB
    # 25 more: what is left of the hole's pages and the free block behind it are one.
    assert allocator.allocate(25 * MIB).address == 25 * MIB
    allocator.free(last)
    with pytest.raises(OutOfMemoryError):
        allocator.allocate(46 * MIB)


def test_workspaces_come_first_and_stay() -> None:
    seen = replay([(1, MIB), (1, 0)], expandable_segments=True)
    assert seen.peak_allocated_bytes == CUBLAS_WORKSPACE_BYTES + MIB
    assert seen.peak_reserved_bytes == 22 * MIB
    assert not replay([], expandable_segments=True, cap_bytes=19 * MIB).fits


@both
def test_blocks_are_reused_only_on_their_own_stream(expandable: bool) -> None:
    events = [(1, 40 * MIB), (1, 0), (2, 40 * MIB), (2, 0), (3, 40 * MIB)]
    same = replay(events, expandable_segments=expandable, streams={1: 5, 2: 5, 3: 5}, workspaces=())
    other = replay(events, expandable_segments=expandable, streams={2: 5}, workspaces=())
    assert (same.peak_reserved_bytes, other.peak_reserved_bytes) == (40 * MIB, 80 * MIB)
    capped = replay(events, expandable_segments=expandable, streams={2: 5}, cap_bytes=40 * MIB, workspaces=())
    assert capped.fits and capped.retries == 2  # each stream gives back what it has


@both
def test_a_cache_that_the_program_empties(expandable: bool) -> None:
    events = [(1, 40 * MIB), (1, 0), (0, 0), (2, MIB), (3, 60 * MIB)]
    seen = replay(events, expandable_segments=expandable, workspaces=())
    assert (seen.peak_reserved_bytes, seen.retries) == (62 * MIB, 0)


# Sizes around every limit.
sizes = st.one_of(
    st.integers(1, 4 * KIB), st.integers(1, 2 * MIB), st.integers(9 * MIB, 13 * MIB), st.integers(1, 90 * MIB)
)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(st.booleans(), sizes, st.integers(0, 2**20)), max_size=120),
    expandable=st.booleans(),
    cap=st.sampled_from([None, 200 * MIB]),
)
def test_the_books_balance(steps: list[tuple[bool, int, int]], expandable: bool, cap: int | None) -> None:
    allocator = Allocator(expandable_segments=expandable, cap_bytes=cap)
    live: list[Block] = []
    requested: list[int] = []
    for frees, size, pick in steps:
        if frees and live:
            index = pick % len(live)
            allocator.free(live.pop(index))
            requested.pop(index)
        else:
            try:
                live.append(allocator.allocate(size))
                requested.append(-(-size // 512) * 512)
            except OutOfMemoryError:
                assert cap is not None
        check(allocator, live, requested, expandable)


def check(allocator: Allocator, live: list[Block], requested: list[int], expandable: bool) -> None:
    assert allocator.allocated_bytes == sum(block.size for block in live)
    for block, size in zip(live, requested, strict=True):
        assert size <= block.size <= size + (0 if expandable or size <= MIB else MIB)
    assert allocator.allocated_bytes <= allocator.device.reserved_bytes <= allocator.device.peak_bytes
    assert allocator.device.cap_bytes is None or allocator.device.peak_bytes <= allocator.device.cap_bytes
    cached = 0
    for pool in allocator.pools.values():
        cached += sum(size for size, _, _ in pool.cached)
        check_pool(pool, [block for block in live if block.pool is pool])
    assert allocator.device.reserved_bytes == allocator.allocated_bytes + cached


def check_pool(pool: Pool, live: list[Block]) -> None:
    assert pool.cached == sorted(pool.cached, key=lambda entry: entry[:2])
    free = [block for _, _, block in pool.cached]
    assert all((size, address) == (block.size, block.address) for size, address, block in pool.cached)
    assert not any(block.used or not block.mapped for block in free) and all(block.used for block in live)
    holes = [block for _, block in getattr(pool, "holes", [])]
    everything = sorted([*live, *free, *holes], key=lambda block: block.address)
    for block, following in itertools.pairwise(everything):
        assert block.address + block.size <= following.address  # nothing lies on anything else
    for block in everything:
        if block.after:
            assert block.after.before is block and block.after.address == block.address + block.size
            # No two free neighbours of one kind.
            assert block.used or block.after.used or block.mapped != block.after.mapped
