"""Where gradients wait between the product that makes them and the optimizer's step: on the last rank, by tensor.

The last rank is the one that peaks highest: it owns the last layers, whose gradients come first. References are to
deepspeed 0.19.8: s12 = runtime/zero/stage_1_and_2.py, z3 = runtime/zero/stage3.py.
"""

from dataclasses import dataclass
from typing import Protocol

from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.memory.setting import MemorySetting


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of the model: its size, and the ranks whose shares it lies in."""

    elements: int
    first_rank: int
    last_rank: int
    own_elements: int
    """Of them in the last rank's share."""
    is_matrix: bool

    @property
    def is_own(self) -> bool:
        """Whether a part of it is in the last rank's share."""
        return self.own_elements > 0


@dataclass(frozen=True, slots=True)
class BlockPlaces:
    """The tensors of one block, those of each module in the order in which their gradients come."""

    norm_1: tuple[Place, ...]
    qkv: tuple[Place, ...]
    proj: tuple[Place, ...]
    norm_2: tuple[Place, ...]
    fc: tuple[Place, ...]
    out: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """All tensors of a model. Matrices and vectors are divided separately (training/engine.py: parameter_groups)."""

    tokens: Place
    positions: Place
    blocks: tuple[BlockPlaces, ...]
    last_norm: tuple[Place, ...]
    matrices: tuple[Place, ...]
    """In the model's order."""
    vectors: tuple[Place, ...]


def layout(model: GPT2Config, ranks: int) -> Layout:
    """Which tensor lies in whose share."""
    d = model.emb_dim
    matrix_elements = (model.vocab_size + model.context_length + model.n_layers * 12 * d) * d
    matrices = _Shares(matrix_elements, ranks, is_matrix=True)
    vectors = _Shares(model.parameters - matrix_elements, ranks, is_matrix=False)
    tokens, positions = matrices.place(model.vocab_size * d), matrices.place(model.context_length * d)
    blocks = []
    for _ in range(model.n_layers):
        norm_1 = vectors.place(d), vectors.place(d)
        qkv = ((vectors.place(3 * d),) if model.qkv_bias else ()) + (matrices.place(3 * d * d),)
        proj = vectors.place(d), matrices.place(d * d)
        norm_2 = vectors.place(d), vectors.place(d)
        fc = vectors.place(4 * d), matrices.place(4 * d * d)
        out = vectors.place(d), matrices.place(4 * d * d)
        blocks.append(BlockPlaces(norm_1=norm_1, qkv=qkv, proj=proj, norm_2=norm_2, fc=fc, out=out))
    last_norm = vectors.place(d), vectors.place(d)
    return Layout(tokens, positions, tuple(blocks), last_norm, tuple(matrices.placed), tuple(vectors.placed))


class _Shares:
    """A flat buffer, divided equally among the ranks and filled tensor by tensor."""

    def __init__(self, elements: int, ranks: int, *, is_matrix: bool) -> None:
        self.share = -(-elements // ranks)
        self.ranks = ranks
        self.is_matrix = is_matrix
        self.filled = 0
        self.placed: list[Place] = []

    def place(self, elements: int) -> Place:
        begin, self.filled = self.filled, self.filled + elements
        first, last = begin // self.share, (self.filled - 1) // self.share
        own = self.filled - max(begin, self.share * (self.ranks - 1)) if last == self.ranks - 1 else 0
        self.placed.append(Place(elements, first, last, own, self.is_matrix))
        return self.placed[-1]


class Gradients(Protocol):
    """What a backward pass does with a gradient as soon as it is there."""

    held_bytes: int
    """Gradients and their sums, without the buckets."""
    bucket_bytes: int

    def hand_over(self, gradient: Place) -> int:
        """Takes a gradient, whose own storage the caller counts; returns the most that is held on the way."""
        ...

    def exchange(self) -> int:
        """Sends what waits to be sent; returns the most that is held on the way."""
        ...


class Kept:
    """ZeRO-0, and ZeRO-1 before it reduces: every gradient stays where it is, or is added to its sum."""

    def __init__(self, setting: MemorySetting) -> None:
        s, a = setting.dtype_bytes, setting.accumulate_bytes
        later = setting.accumulation > 1
        bf16_optimizer = setting.has_bf16_optimizer
        # A sum in another type needs the gradient in that type first (s12:1237, bf16_optimizer.py:523).
        self.converted_bytes = a if a > s else 0
        self.added_bytes = 0 if later or bf16_optimizer else a
        self.held_bytes = a * setting.model.parameters if later or bf16_optimizer else 0
        if bf16_optimizer and not setting.immediate_grad_update:
            self.converted_bytes = 0
            self.added_bytes = s  # kept beside the sums until the backward pass is over
        # ZeRO-1 makes its buckets at the first gradient, long before it needs them (s12:2286).
        self.bucket_bytes = bucket_bytes(setting)

    def hand_over(self, gradient: Place) -> int:
        """See Gradients."""
        most = self.held_bytes + self.converted_bytes * gradient.elements
        self.held_bytes += self.added_bytes * gradient.elements
        return most

    def exchange(self) -> int:
        """See Gradients: nothing waits."""
        return self.held_bytes


class Reduction:
    """ZeRO-2, and ZeRO-1 when it reduces: gradients go into a bucket, a full one is exchanged, the own share stays."""

    def __init__(self, setting: MemorySetting, places: Layout, *, after_backward: bool = False) -> None:
        self.s, a, stage = setting.dtype_bytes, setting.accumulate_bytes, setting.zero_stage
        later = setting.accumulation > 1
        self.capacity = setting.reduce_bucket_elements
        self.bucket_bytes = bucket_bytes(setting)
        self.gradient_bytes = a if stage == 1 else self.s
        self.sums_in_fp32 = a > self.s
        """Then each tensor of the share is turned to fp32 and added to one flat sum (s12:1268)."""
        # Whether gradients that are too large for the bucket stay after the exchange, until the backward pass is over.
        self.keeps_own = self.sums_in_fp32 or setting.offload_optimizer
        self.keeps_foreign = stage == 1
        self.norm_bytes = 8 if setting.offload_optimizer else 0
        kinds = {True: places.matrices, False: places.vectors}
        self.unmade: dict[frozenset[bool], int]
        """Bytes of the share's parts, of matrices (True), vectors (False) or both, until the first of them comes."""
        if self.sums_in_fp32:
            self.unmade = {frozenset([kind]): 4 * sum(one.own_elements for one in kinds[kind]) for kind in kinds}
        else:
            # Whole tensors, also the first, of which the share may have only a part (s12:2187).
            own = sum(one.elements for kind in kinds.values() for one in kind if one.is_own)
            self.unmade = {frozenset(kinds): 0 if setting.offload_optimizer else self.s * own}
        self.share_bytes = sum(self.unmade.values())
        # The sum of earlier micro-batches: in place for fp32 (s12:1303), else a second share beside the new one, or for
        # ZeRO-1 every gradient where it was.
        if stage == 2 and self.sums_in_fp32 and later:
            self.unmade = {}
        earlier = self.share_bytes if later else 0
        self.moves = stage == 1 and (later or after_backward)
        self.held_bytes = a * setting.model.parameters if self.moves else earlier
        self.waiting: list[Place] = []
        self.filled = 0

    def hand_over(self, gradient: Place) -> int:
        """See Gradients."""
        most = self.held_bytes
        if self.filled + gradient.elements > self.capacity:
            most = self.exchange()
        self.waiting.append(gradient)
        self.filled += gradient.elements
        if gradient.elements > self.capacity and not self.moves:
            self.held_bytes += self.gradient_bytes * gradient.elements
        elif gradient.elements <= self.capacity and self.moves:
            self.held_bytes -= self.gradient_bytes * gradient.elements
        return most

    def exchange(self) -> int:
        """See Gradients."""
        own = [one for one in self.waiting if one.is_own]
        foreign = {rank for one in self.waiting for rank in range(one.first_rank, one.last_rank + (not one.is_own))}
        # Neighbours in one rank's share are exchanged as they lie; otherwise a copy brings the pieces together
        # (s12:1666), and tensors that are added one by one to fp32 sums are pieces each.
        pieces = len(foreign) + (len(own) if self.sums_in_fp32 else min(1, len(own)))
        total = sum(one.elements for one in self.waiting)
        copies = self.gradient_bytes * total if pieces > 1 else 0
        if self.gradient_bytes > self.s:
            copies += self.s * total  # exchanged in the type of the weights
        made = [kinds for kinds in self.unmade if any(one.is_matrix in kinds for one in own)]
        new_share = sum(self.unmade.pop(kinds) for kinds in made)
        if self.sums_in_fp32:
            copies += 4 * max((one.own_elements for one in own), default=0)
            most = self.held_bytes + new_share + copies
        else:
            most = self.held_bytes + max(new_share, copies)
        # Under offload the norm is taken before a gradient leaves, in fp64 (s12:1873).
        most = max(
            most, self.held_bytes + new_share + self.norm_bytes * max((one.own_elements for one in own), default=0)
        )
        self.held_bytes += new_share
        for one in self.waiting:
            stays = self.keeps_own if one.is_own else self.keeps_foreign
            if one.elements > self.capacity and not stays:
                self.held_bytes -= self.gradient_bytes * one.elements
        self.waiting.clear()
        self.filled = 0
        return most


class Divided:
    """ZeRO-3: gradients go into a bucket and from there, divided, to their sums, which are there from the start."""

    def __init__(self, setting: MemorySetting) -> None:
        self.s, a = setting.dtype_bytes, setting.accumulate_bytes
        self.capacity = setting.reduce_bucket_elements
        self.bucket_bytes = bucket_bytes(setting)
        self.converted_bytes = a / setting.ranks if a > self.s else 0
        # Under offload each sum comes back to the GPU for its norm, which is taken in fp64.
        self.norm_bytes = (a + 8) / setting.ranks if setting.offload_optimizer else 0
        self.held_bytes = 0 if setting.offload_optimizer else -(-a * setting.model.parameters // setting.ranks)
        self.waiting: list[Place] = []
        self.filled = 0

    def hand_over(self, gradient: Place) -> int:
        """See Gradients."""
        most = self.held_bytes
        if self.filled + gradient.elements > self.capacity:
            most = self.exchange()
        self.waiting.append(gradient)
        self.filled += gradient.elements
        if gradient.elements > self.capacity:
            self.held_bytes += self.s * gradient.elements
        return most

    def exchange(self) -> int:
        """See Gradients."""
        # The shares of several tensors are sorted by rank into a copy (runtime/comm/coalesced_collectives.py:122), and
        # the own ones turned into the type of the sums (z3:1912).
        copies = self.s * self.filled if len(self.waiting) > 1 else 0
        largest = max((one.elements for one in self.waiting), default=0)
        most = self.held_bytes + copies + int(self.converted_bytes * self.filled + self.norm_bytes * largest)
        self.held_bytes -= self.s * sum(one.elements for one in self.waiting if one.elements > self.capacity)
        self.waiting.clear()
        self.filled = 0
        return most


def reduces_at_once(setting: MemorySetting) -> bool:
    """Whether the last backward pass exchanges gradients as they come, not all of them after it."""
    return setting.zero_stage == 2 or (
        setting.zero_stage == 1 and setting.overlap_comm and not setting.has_bf16_optimizer
    )


def bucket_bytes(setting: MemorySetting) -> int:
    """Buckets exist in full, whatever is in them (s12:3266), two of them where exchange and backward overlap.

    ZeRO-3 has one; without ZeRO and for the bf16 optimizer there is none.
    """
    if setting.zero_stage == 0 or setting.has_bf16_optimizer:
        return 0
    each = setting.accumulate_bytes if setting.zero_stage == 1 else setting.dtype_bytes
    return each * setting.reduce_bucket_elements * (2 if setting.overlap_comm and setting.zero_stage < 3 else 1)
