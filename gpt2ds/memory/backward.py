"""The backward pass, moment by moment: which gradients are on the GPU when. Independent of the batch.

Each moment is one in which something large is made. The order is the autograd engine's: a parameter's gradient is
handed over as soon as the product that makes it is done, before the pass goes on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from gpt2ds.memory.reduction import Divided, Gradients, Kept, Layout, Place, Reduction, layout, reduces_at_once
from gpt2ds.memory.setting import MemorySetting

# Live tensors of a block at each moment, in units of s·d·N: what the forward pass kept of it (16), the gradient of its
# output (1), and what comes and goes in its backward pass. For instance "gelu": the last product's input is gone (4)
# and its gradient there (4), beside the gradient that GELU makes of it (4).
WORKING_SET = {
    "out product": 21,
    "out": 17,
    "gelu": 21,
    "fc product": 14,
    "fc": 9,
    "norm 2": 8,
    "proj product": 8,
    "proj": 8,
    "attention": 11,
    "qkv product": 7,
    "qkv": 3,
    "norm 1": 2,
}

# DeepSpeed reduces without ZeRO, and for its bf16 optimizer, in pieces of so many elements (runtime/engine.py:151).
REDUCED_ELEMENTS = 500_000_000


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes of gradients on the GPU at one moment."""

    at: str
    block: int | None
    """None: after the last block."""
    held_bytes: int
    """Gradients and their sums, and copies of them while they are exchanged."""
    in_flight_bytes: int
    """A gradient just made."""
    head_bytes: int
    """The head's gradient, and at the end the embedding's: both are the token embedding's."""
    bucket_bytes: int

    @property
    def gradient_bytes(self) -> int:
        """All but the buckets."""
        return self.held_bytes + self.in_flight_bytes + self.head_bytes


@dataclass(frozen=True, slots=True)
class Course:
    """The gradients' part of the memory over the last micro-batch of a step, which has the most of it."""

    held_before_bytes: int
    """Sums of the micro-batches before."""
    bucket_before_bytes: int
    share_elements: int
    """All tensors that the rank's share touches, whole."""
    largest_own_elements: int
    """Of the part of one tensor in the rank's share."""
    moments: tuple[Moment, ...]


def gradient_course(setting: MemorySetting) -> Course:
    """The last micro-batch of a step, and the reduction that follows it."""
    # What the batch and the activations are is of no concern here, so that a search over them finds it made.
    return _course(replace(setting, micro_batch=1, loss_chunk=1, recompute="none"))


@lru_cache(maxsize=64)
def _course(setting: MemorySetting) -> Course:
    places = layout(setting.model, setting.ranks)
    gradients = _gradients(setting, places)
    held = gradients.held_bytes
    # ZeRO-1 keeps its buckets from one micro-batch to the next, ZeRO-3 for ever (runtime/zero/stage3.py:782).
    keeps_buckets = setting.zero_stage == 3 or (setting.zero_stage == 1 and setting.accumulation > 1)
    bucket = gradients.bucket_bytes if keeps_buckets else 0
    every = (*places.matrices, *places.vectors)
    return Course(
        held_before_bytes=held,
        bucket_before_bytes=bucket,
        share_elements=sum(one.elements for one in every if one.is_own),
        largest_own_elements=max(one.own_elements for one in every),
        moments=tuple(_moments(setting, places, gradients)),
    )


def _gradients(setting: MemorySetting, places: Layout) -> Gradients:
    if setting.zero_stage == 3:
        return Divided(setting)
    return Reduction(setting, places) if reduces_at_once(setting) else Kept(setting)


def _moments(setting: MemorySetting, places: Layout, gradients: Gradients) -> Iterator[Moment]:
    model, s = setting.model, setting.dtype_bytes
    head = s * model.vocab_size * model.emb_dim

    def hand_over(at: str, block: int | None, tensors: tuple[Place, ...], head_bytes: int) -> Iterator[Moment]:
        for one in tensors:
            most = gradients.hand_over(one)
            yield Moment(at, block, most, s * one.elements, head_bytes, gradients.bucket_bytes)

    def during(at: str, block: int, made: int = 0) -> Moment:
        return Moment(at, block, gradients.held_bytes, s * made, head, gradients.bucket_bytes)

    yield from hand_over("norm 1", model.n_layers, places.last_norm, head)
    for number in range(model.n_layers - 1, -1, -1):
        block = places.blocks[number]
        yield during("out product", number, block.out[-1].elements)
        yield from hand_over("out", number, block.out, head)
        yield during("gelu", number)
        yield during("fc product", number, block.fc[-1].elements)
        yield from hand_over("fc", number, block.fc, head)
        yield from hand_over("norm 2", number, block.norm_2, head)
        yield during("proj product", number, block.proj[-1].elements)
        yield from hand_over("proj", number, block.proj, head)
        yield during("attention", number)
        yield during("qkv product", number, block.qkv[-1].elements)
        yield from hand_over("qkv", number, block.qkv, head)
        yield from hand_over("norm 1", number, block.norm_1, head)
    yield from hand_over("tied embedding", None, (places.positions,), head)
    # The head's and the embedding's gradient of the tied weight, before one is added to the other.
    yield Moment("tied embedding", None, gradients.held_bytes, 0, 2 * head, gradients.bucket_bytes)
    yield from hand_over("tied embedding", None, (places.tokens,), 0)
    if isinstance(gradients, Kept) and (setting.zero_stage == 0 or setting.has_bf16_optimizer):
        held = gradients.held_bytes + _flat_copies(setting, places)
        yield Moment("reduction", None, held, 0, 0, 0)
        return
    if isinstance(gradients, Kept):
        # ZeRO-1 without overlap exchanges all gradients when the last backward pass is over, in the model's order.
        gradients = Reduction(setting, places, after_backward=True)
        for one in (*places.matrices, *places.vectors):
            yield Moment("reduction", None, gradients.hand_over(one), 0, 0, gradients.bucket_bytes)
    yield Moment("reduction", None, gradients.exchange(), 0, 0, gradients.bucket_bytes)
    if isinstance(gradients, Reduction) and not setting.offload_optimizer:
        # The norm is summed in fp64, one tensor at a time (runtime/zero/stage_1_and_2.py:2684). Until then ZeRO-1 keeps
        # other ranks' gradients, and with them the buckets in which they lie.
        norm = 8 * max(one.own_elements for one in (*places.matrices, *places.vectors))
        kept = setting.zero_stage == 1 and setting.ranks > 1
        held = gradients.held_bytes if setting.zero_stage == 1 else gradients.share_bytes
        yield Moment("gradient norm", None, held + norm, 0, 0, gradients.bucket_bytes if kept else 0)


def _flat_copies(setting: MemorySetting, places: Layout) -> int:
    """What the exchange without ZeRO takes: a flat copy of many tensors, and one in the type that is sent.

    runtime/engine.py:3795. The bf16 optimizer's sums are two flat tensors already, and sent in bf16.
    """
    if setting.has_bf16_optimizer:
        matrices = sum(one.elements for one in places.matrices)
        if matrices > REDUCED_ELEMENTS:
            return 2 * matrices
        return (4 + 2) * setting.model.parameters
    piece = 0
    for one in (*places.matrices, *places.vectors):
        piece += one.elements
        if piece > REDUCED_ELEMENTS:
            break
    return setting.dtype_bytes * piece
