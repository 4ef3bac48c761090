"""Which window each rank reads at each step."""

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2ds.corpus.batches import Batches, Windows, fixed_windows, permuted
from gpt2ds.corpus.shards import Shard, header
from gpt2ds.errors import UserError


def shard(tmp_path: Path, number: int, first: int, count: int) -> Shard:
    path = tmp_path / f"x_train_{number:06d}.bin"
    path.write_bytes(header(count) + np.arange(first, first + count, dtype="<u2").tobytes())
    return Shard(path=path, tokens=count)


@pytest.fixture
def windows(tmp_path: Path) -> Windows:
    """Tokens that are their own positions: 1001 = 100 windows of 10, 10 = none, 57 = 5 with 6 tokens unread."""
    return Windows([shard(tmp_path, 0, 0, 1001), shard(tmp_path, 1, 2000, 10), shard(tmp_path, 2, 3000, 57)], 10)


def test_windows_overlap_by_one_and_keep_to_their_shard(windows: Windows) -> None:
    assert len(windows) == 105
    rows = windows[np.array([0, 1, 99, 100, 104])]
    assert rows.dtype == np.int64
    assert rows.tolist() == [list(range(start, start + 11)) for start in (0, 10, 990, 3000, 3040)]
    assert windows[np.empty(0, dtype=np.int64)].shape == (0, 11)


@pytest.mark.parametrize("outside", [[-1], [105], [0, 200]])
def test_windows_outside(windows: Windows, outside: list[int]) -> None:
    with pytest.raises(IndexError):
        windows[np.array(outside)]


@pytest.mark.parametrize(("tokens", "count"), [(0, 0), (1, 0), (10, 0), (11, 1), (20, 1), (21, 2)])
def test_number_of_windows(tmp_path: Path, tokens: int, count: int) -> None:
    assert len(Windows([shard(tmp_path, 0, 0, tokens)] if tokens else [], 10)) == count


@settings(max_examples=300, deadline=None)
@given(length=st.integers(1, 3000), seed=st.integers(-(2**63), 2**64), epoch=st.integers(0, 10**6))
def test_a_permutation_is_a_bijection(length: int, seed: int, epoch: int) -> None:
    values = permuted(np.arange(length), length, seed, epoch)
    assert np.array_equal(np.sort(values), np.arange(length))


def test_permutations_of_large_lengths_stay_inside() -> None:
    for length in (2**31 - 1, 2**32, 10**12, 2**62):
        positions = np.arange(10_000) * (length // 10_000)
        values = permuted(positions, length, 7, 3)
        assert values.min() >= 0 and values.max() < length
        assert len(np.unique(values)) == len(positions)


def test_a_permutation_is_the_same_in_any_piece_and_for_ever() -> None:
    whole = permuted(np.arange(1000), 1000, 1337, 0)
    assert np.array_equal(whole[[5, 700, 0]], permuted(np.array([5, 700, 0]), 1000, 1337, 0))
    # Were these numbers to change, every run would resume into another order.
    assert whole[:8].tolist() == [360, 301, 61, 56, 166, 878, 121, 285]


def test_permutations_are_well_mixed() -> None:
    length = 20_000
    first, second, other = (
        permuted(np.arange(length), length, seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))
    )
    for a, b in ((first, second), (first, other), (first, np.arange(length))):
        assert np.mean(a == b) < 5 / length * 10
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.03
    counts, _ = np.histogram(first[:2000], bins=20, range=(0, length))
    assert counts.min() > 60 and counts.max() < 145  # 100 expected, standard deviation 9
    places = [int(permuted(np.array([0]), 10, seed, 0)[0]) for seed in range(2000)]
    assert np.bincount(places, minlength=10).min() > 140


def test_positions_outside() -> None:
    for outside in (-1, 10):
        with pytest.raises(IndexError):
            permuted(np.array([outside]), 10, 1, 0)


def test_an_epoch_of_windows_is_fast() -> None:
    start = time.perf_counter()
    permuted(np.arange(1_000_000), 1_000_000, 1, 0)
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("seen", [0, 24, 96, 1000 * 24])
def test_ranks_and_rounds_partition_a_step(windows: Windows, seen: int) -> None:
    reference = None
    for micro_batch, ranks in ((24, 1), (1, 1), (12, 2), (3, 2), (2, 4), (4, 3), (1, 24)):
        rows = []
        for rank in range(ranks):
            batches = Batches(windows, global_batch=24, micro_batch=micro_batch, rank=rank, ranks=ranks, seed=5)
            parts = list(batches.micro_batches(seen))
            assert len(parts) == batches.accumulation == 24 // (micro_batch * ranks)
            assert all(part.shape == (micro_batch, 11) for part in parts)
            rows += [tuple(row) for part in parts for row in part.tolist()]
        assert len(rows) == 24
        reference = reference or sorted(rows)
        assert sorted(rows) == reference


def test_rounds_and_ranks_take_neighbouring_positions(windows: Windows) -> None:
    order = permuted(np.arange(105), 105, 5, 0)
    batches = Batches(windows, global_batch=12, micro_batch=2, rank=1, ranks=3, seed=5)
    first, second = batches.micro_batches(24)
    assert np.array_equal(first, windows[order[[26, 27]]])
    assert np.array_equal(second, windows[order[[32, 33]]])


def test_every_window_once_an_epoch_also_across_steps(windows: Windows) -> None:
    batches = Batches(windows, global_batch=10, micro_batch=5, rank=0, ranks=1, seed=9)
    starts = [int(row[0]) for step in range(21) for part in batches.micro_batches(step * 10) for row in part]
    first, second = starts[:105], starts[105:]
    assert len(set(first)) == len(set(second)) == 105
    assert first != second


@pytest.mark.parametrize("global_batch", [106, 500])
def test_too_few_windows_names_what_would_work(windows: Windows, global_batch: int) -> None:
    with pytest.raises(
        UserError, match=rf"105 windows.*needs {global_batch}.*batch to 105 or less.*context to (\d+) or less"
    ) as caught:
        Batches(windows, global_batch=global_batch, micro_batch=1, rank=0, ranks=1, seed=0)
    context = int(str(caught.value).split("context to ")[1].split()[0])
    assert len(Windows(windows.shards, context)) >= global_batch
    assert len(Windows(windows.shards, context + 1)) < global_batch


def test_no_window_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"= 0 windows.*lower the context to 1 or less, or prepare more text"):
        Batches(Windows([shard(tmp_path, 0, 0, 9)], 10), global_batch=8, micro_batch=1, rank=0, ranks=1, seed=0)
    with pytest.raises(UserError, match=r"= 0 windows.*: prepare more text$"):
        Batches(Windows([shard(tmp_path, 0, 0, 1)], 10), global_batch=8, micro_batch=1, rank=0, ranks=1, seed=0)


def test_fixed_windows(windows: Windows) -> None:
    assert fixed_windows(windows, 5).tolist() == [0, 21, 42, 63, 84]
    assert fixed_windows(windows, 1000).tolist() == list(range(105))


def test_fixed_windows_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"validation split holds 8 tokens.*context to 7 or less"):
        fixed_windows(Windows([shard(tmp_path, 0, 0, 8)], 10), 5)
