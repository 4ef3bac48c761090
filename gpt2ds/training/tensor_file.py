"""Safetensors files written tensor by tensor: no copy of the whole in host memory, and the digest on the way.

The format's own writer wants every tensor on the CPU at once, and the digest would read the file a second time.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Put on the disk piece by piece: whoever watches for a rank that hangs sees each tensor, but not one sync of gigabytes.
_SYNC_BYTES = 2**30

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}


class TensorSpec(NamedTuple):
    """What stands in a file's header of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFile:
    """A file that is being written: `add` each tensor in the order of the specs, then `close`.

    Raises OSError as the disk does. What is on the disk before `close` is no file of this format.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        self._digest = hashlib.sha256()
        self._bytes = self._synced_bytes = 0
        self._left = list(specs)
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, dtype, shape in self._left:
            start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors lie where they can be mapped
        self._file = path.open("wb")
        self._write(len(text).to_bytes(8, "little") + text)

    def add(self, tensor: Tensor) -> None:
        """The next tensor, from any device."""
        name, dtype, shape = self._left.pop(0)
        assert (dtype, shape) == (tensor.dtype, tuple(tensor.shape)), f"{name} is not what the header says"
        # One tensor at a time is on the host.
        flat = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
        self._write(memoryview(flat.numpy()))  # type: ignore[arg-type]

    def close(self) -> dict[str, Any]:
        """Puts the file on the disk and not only into the page cache; returns its {"bytes", "sha256"}."""
        assert not self._left, f"{self._left[0].name} was never added"
        self._sync()
        self._file.close()
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._bytes += len(content)
        if self._bytes - self._synced_bytes >= _SYNC_BYTES:
            self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced_bytes = self._bytes

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._file.close()
        except OSError:
            if error is None:
                raise
