"""Counts the bytes of every storage that a dispatched torch operation touches, from its first use until it dies.

On meta tensors this is the memory that the same program would take on a GPU: shapes and lifetimes are all that counts.
What a CUDA kernel allocates inside itself no dispatcher sees; a small table adds it.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2ds.probe.gradient_sums import holders_of_one_alone, would_be_in_place

# CUDA's caching allocator rounds every block up to this (PyTorch, c10/core/AllocatorConfig.h: kMinBlockSize).
CUDA_BLOCK_BYTES = 512


def flash_backward_bytes(query: Tensor) -> int:
    """Sums of the query's gradient in fp32 and the softmax's row sums, for a query (B, H, T, D).

    Rows are rounded to 128, D to 32 (PyTorch, aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp: mha_bwd,
    dq_accum and softmax_d; the deterministic variant, which has several dq_accum, is not used).
    """
    B, H, T, D = query.shape
    wide = -(-D // 32) * 32 if D <= 192 else 256
    return 4 * B * H * -(-T // 128) * 128 * (wide + 1)


def efficient_backward_bytes(query: Tensor) -> int:
    """The product of output and its gradient, its row sums, and these once more in another order.

    In 16 bits the kernel makes the row sums itself (PyTorch, aten/src/ATen/native/transformers/cuda/
    attention_backward.cu: delta).
    """
    B, H, T, D = query.shape
    return 4 * B * H * T * (D + 2 if query.dtype == torch.float32 else 1)


# Left out, because nothing else is live by then: the sorted token ids and partial sums of the embedding's backward; a
# few MiB of the norms'.
HIDDEN_BYTES: dict[str, Callable[[Tensor], int]] = {
    "aten._scaled_dot_product_flash_attention_backward.default": flash_backward_bytes,
    "aten._scaled_dot_product_efficient_attention_backward.default": efficient_backward_bytes,
}
"""Bytes that a CUDA kernel takes and returns while it runs, from its second argument, by the operation's name."""


@dataclass(kw_only=True, slots=True)
class PhasePeak:
    """The most that was live during one phase, and what was left at its end."""

    name: str
    peak_bytes: int
    operation: str = ""
    """The operation at the peak."""
    after_bytes: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    """Bytes at the peak by label: that of the phase in which a storage was first seen, or the one it was given."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, keeps the live bytes of every strided storage that an operation takes or returns.

    device: count only this kind of device ("meta", "cpu"). rounding: bytes to which each storage is rounded up; 1 for
    none. hidden: add HIDDEN_BYTES at the operations that have them. log_events: keep `events`.
    """

    _paused = False

    def __init__(
        self,
        *,
        device: str | None = None,
        rounding: int = CUDA_BLOCK_BYTES,
        hidden: bool = False,
        log_events: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        holders_of_one_alone()  # before anything of ours is counted
        self.device, self.rounding, self.hidden = device, rounding, hidden
        self.current_bytes = 0
        self.phases = [PhasePeak(name="start", peak_bytes=0)]
        self.events: list[tuple[int, int]] | None = [] if log_events else None
        """(number of the storage, bytes) when it is allocated and (number, 0) when it is freed, in order; (0, 0) when
        the allocator's cache is emptied.
        """
        self.streams: dict[int, int] = {}
        """The stream of each storage in `events` that was not allocated on the default one, by the storage's number."""
        self.parts: dict[str, int] = {}
        self._storages: dict[int, _Entry] = {}
        self._count = 0
        self._operation = ""
        self._label = "start"
        self._stream = 0

    @property
    def peak_bytes(self) -> int:
        """Over all phases."""
        return max(phase.peak_bytes for phase in self.phases)

    def begin(self, name: str, label: str | None = None) -> None:
        """Ends the running phase and starts the next; its peak begins at what is live now.

        label: what the storages are called that are first seen in it; the phase's name by default.
        """
        self.phases[-1].after_bytes = self.current_bytes
        self._label = label or name
        self.phases.append(PhasePeak(name=name, peak_bytes=self.current_bytes, parts=self._live_parts()))

    def finish(self) -> list[PhasePeak]:
        """Ends the last phase; all phases in order."""
        self.phases[-1].after_bytes = self.current_bytes
        return self.phases

    def label(self, tensors: Iterable[Tensor], name: str) -> None:
        """Counts the storages of these tensors under another name from now on; new ones are added."""
        for tensor in tensors:
            self.touch(tensor)
            entry = self._storages.get(id(tensor.untyped_storage()))
            if entry is not None:
                self.parts[entry.label] -= entry.size_bytes
                entry.label = name
                self.parts[name] = self.parts.get(name, 0) + entry.size_bytes

    @contextlib.contextmanager
    def on_stream(self, number: int) -> Iterator[None]:
        """Meanwhile storages are allocated on this stream; 0 is the default one."""
        earlier, self._stream = self._stream, number
        try:
            yield
        finally:
            self._stream = earlier

    def cache_emptied(self) -> None:
        """Notes that the program gave the allocator's free blocks back."""
        if self.events is not None:
            self.events.append((0, 0))

    @classmethod
    @contextlib.contextmanager
    def paused(cls) -> Iterator[None]:
        """Meanwhile no count sees new storages."""
        earlier, cls._paused = cls._paused, True
        try:
            yield
        finally:
            cls._paused = earlier

    def touch(self, tensor: Any) -> None:
        """Counts this tensor's storage if it is new, or corrects its size if it was resized."""
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return
        if self._paused or (self.device and tensor.device.type != self.device):
            return
        storage = tensor.untyped_storage()
        size = -(-storage.nbytes() // self.rounding) * self.rounding
        key = id(storage)
        entry = self._storages.get(key)
        if entry is None:
            # The number outlives the key, which another storage may have after this one's death.
            self._count += 1
            entry = _Entry(number=self._count, label=self._label, size_bytes=0, alive=None)
            entry.alive = weakref.ref(storage, lambda _: self._resize(self._storages.pop(key), 0))
            self._storages[key] = entry
            if self._stream:
                self.streams[entry.number] = self._stream
        if size != entry.size_bytes:
            self._resize(entry, size)

    def _resize(self, entry: "_Entry", size: int) -> None:
        if self.events is not None:
            if entry.size_bytes:
                self.events.append((entry.number, 0))
            if size:
                self.events.append((entry.number, size))
        change = size - entry.size_bytes
        entry.size_bytes = size
        self.current_bytes += change
        self.parts[entry.label] = self.parts.get(entry.label, 0) + change
        self._note_peak(0)

    def _live_parts(self) -> dict[str, int]:
        return {name: size for name, size in self.parts.items() if size}

    def _note_peak(self, hidden_bytes: int) -> None:
        phase = self.phases[-1]
        if self.current_bytes + hidden_bytes > phase.peak_bytes:
            phase.peak_bytes = self.current_bytes + hidden_bytes
            phase.operation = self._operation
            phase.parts = self._live_parts()
            if hidden_bytes:
                phase.parts["inside a kernel"] = hidden_bytes

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._operation = str(operation)
        result = args[0].add_(args[1]) if would_be_in_place(operation, args) else operation(*args, **kwargs)
        for tensor in tree_leaves((result, args, kwargs)):
            self.touch(tensor)
        if self.hidden and self._operation in HIDDEN_BYTES:
            hidden_bytes = HIDDEN_BYTES[self._operation](args[1])
            if self.events is not None:
                self._count += 1
                self.events += [(self._count, hidden_bytes), (self._count, 0)]
            self._note_peak(hidden_bytes)
        return result


@dataclass(kw_only=True, slots=True)
class _Entry:
    number: int
    label: str
    size_bytes: int
    alive: "weakref.ref[torch.UntypedStorage] | None"
