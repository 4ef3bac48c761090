"""Which window of tokens each rank reads at each step: a pure function of the seed and of one integer, the sequences
seen so far.

So a resumed run, also at another number of ranks or another micro-batch, reads exactly the sequences that it has not
read.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from gpt2ds.corpus.shards import Shard, read_shard
from gpt2ds.errors import UserError

Indices = npt.NDArray[np.int64]

_FEISTEL_ROUNDS = 8


class Windows:
    """All windows of `context` + 1 tokens of a split; neighbours overlap by one token and none straddles two shards.

    Window k of a shard holds its tokens [k*T, k*T + T + 1): the first T are the inputs, the last T the targets. What
    is left at the end of a shard (at most T tokens) is not read.
    """

    def __init__(self, shards: Sequence[Shard], context: int) -> None:
        if context < 1:
            raise UserError(f"the context must be at least 1 token, not {context}")
        self.context = context
        self.tokens = sum(shard.tokens for shard in shards)
        self.shards = tuple(shards)
        self._opened: dict[int, npt.NDArray[np.uint16]] = {}
        self._ends = np.cumsum([max(shard.tokens - 1, 0) // context for shard in shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, indices: Indices) -> Indices:
        """Windows by number: (n,) -> (n, T + 1) int64. IndexError outside [0, len)."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"window {int(indices.min())} to {int(indices.max())} of {len(self)}")
        windows = np.empty((len(indices), self.context + 1), dtype=np.int64)
        owners = np.searchsorted(self._ends, indices, side="right")
        for row, (index, owner) in enumerate(zip(indices.tolist(), owners.tolist(), strict=True)):
            first = index - (int(self._ends[owner - 1]) if owner else 0)
            start = first * self.context
            windows[row] = self._tokens_of(owner)[start : start + self.context + 1]
        return windows

    def _tokens_of(self, owner: int) -> npt.NDArray[np.uint16]:
        if owner not in self._opened:
            self._opened[owner] = read_shard(self.shards[owner].path)
        return self._opened[owner]


def permuted(position: Indices, length: int, seed: int, epoch: int) -> Indices:
    """Where a fixed permutation of [0, length), one per (seed, epoch), sends each position: shapes equal, int64.

    A Feistel network over the smallest even number of bits that holds `length`, walked until it lands inside [0,
    length) (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): no table however long the epoch, and
    no random generator whose stream could change.
    """
    position = np.asarray(position, dtype=np.int64)
    if position.size and not (position.min() >= 0 and position.max() < length):
        raise IndexError(f"positions must lie in [0, {length})")
    half_bits = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    keys = _keys(seed, epoch)
    values = _feistel(position.astype(np.uint64).ravel(), half_bits, keys)
    outside = np.flatnonzero(values >= length)
    while outside.size:  # the domain is under 4 x length, so 3 in 4 walkers at worst go on each time
        values[outside] = _feistel(values[outside], half_bits, keys)
        outside = outside[values[outside] >= length]
    return values.astype(np.int64).reshape(position.shape)


def _feistel(
    values: npt.NDArray[np.uint64], half_bits: np.uint64, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << half_bits) | right


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit flips every output bit about half the
    time; wraps at 64 bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _keys(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    wrap, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15
    start = _mixed(np.array([(seed * golden + 1) & wrap], dtype=np.uint64))
    start = _mixed(start ^ np.array([(epoch + 1) * golden & wrap], dtype=np.uint64))
    steps = np.array([n * golden & wrap for n in range(1, _FEISTEL_ROUNDS + 1)], dtype=np.uint64)
    return _mixed(start + steps)


class Batches:
    """The training order: sequence p of the run is window `permuted(p % n, n, seed, p // n)` of the n windows.

    In accumulation round a of the step that starts at p, rank r takes the micro-batch of positions from p + (a *
    ranks + r) * micro_batch on, so the union over ranks and rounds is the same at any number of ranks and any
    micro-batch with the same global batch.
    """

    def __init__(
        self, windows: Windows, *, global_batch: int, micro_batch: int, rank: int, ranks: int, seed: int
    ) -> None:
        assert 0 <= rank < ranks and global_batch % (micro_batch * ranks) == 0, "the plan makes batches that divide"
        if len(windows) < global_batch:
            raise UserError(_too_few(windows, global_batch))
        self.windows = windows
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.ranks = ranks
        self.seed = seed

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank per optimizer step."""
        return self.global_batch // (self.micro_batch * self.ranks)

    def micro_batches(self, sequences_seen: int) -> Iterator[Indices]:
        """This rank's micro-batches, each (micro_batch, T + 1) int64, of the step that starts after `sequences_seen`
        sequences."""
        for accumulated in range(self.accumulation):
            start = sequences_seen + (accumulated * self.ranks + self.rank) * self.micro_batch
            yield self.windows[self.window_numbers(np.arange(start, start + self.micro_batch, dtype=np.int64))]

    def window_numbers(self, positions: Indices) -> Indices:
        """Positions in the run -> window numbers, (n,) -> (n,); a step may lie across two epochs."""
        count = len(self.windows)
        epochs = positions // count
        numbers = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            numbers[here] = permuted(positions[here] % count, count, self.seed, epoch)
        return numbers


def _too_few(windows: Windows, global_batch: int) -> str:
    count, context = len(windows), windows.context
    facts = (
        f"the training split holds {windows.tokens:,} tokens = {count} windows of {context} + 1; a "
        f"global batch of {global_batch} needs {global_batch}"
    )
    context_that_works = _largest_context(windows, global_batch)
    fixes = ["prepare more text"]
    if context_that_works:
        fixes.insert(0, f"lower the context to {context_that_works} or less")
    if count:
        fixes.insert(0, f"lower the global batch to {count} or less")
    return f"{facts}: {', or '.join(fixes)}"


def _largest_context(windows: Windows, count: int) -> int:
    """The largest context under the present one that leaves `count` windows; 0 if there is none."""
    works, fails = 0, windows.context
    while fails - works > 1:
        middle = (works + fails) // 2
        enough = len(Windows(windows.shards, middle)) >= count
        works, fails = (middle, fails) if enough else (works, middle)
    return works


def fixed_windows(windows: Windows, count: int) -> Indices:
    """The same `count` window numbers at every evaluation, evenly spaced over the split: (count,) int64, or all of
    them when there are fewer.

    UserError if the split holds no window at all.
    """
    available = len(windows)
    if not available:
        raise UserError(
            f"the validation split holds {windows.tokens} tokens, fewer than one window of {windows.context} + 1: "
            f"lower the context to {max(windows.tokens - 1, 1)} or less, or prepare more text or a larger "
            "validation fraction"
        )
    count = min(count, available)
    return np.arange(count, dtype=np.int64) * available // count
