"""The model alone on meta tensors, without DeepSpeed: what its blocks keep for the backward pass, and what the loss
takes.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.gpt2.loss import chunked_cross_entropy, whole_cross_entropy
from gpt2ds.gpt2.model import GPT2
from gpt2ds.probe.live import LiveBytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

aten = torch.ops.aten


@contextlib.contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """Meanwhile attention and dropout are the operations that this device, "cuda" or "cpu", would choose.

    On meta tensors PyTorch would choose an attention that writes out the (T, T) matrix. CUDA takes flash attention in
    16 bits and the memory-efficient kernel in fp32, and a dropout with masks of one byte (PyTorch 2.13,
    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and aten/src/ATen/native/Dropout.cpp).
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, is_causal: bool = False) -> Tensor:
        results: Any
        if device == "cpu":
            results = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal)
        elif q.dtype == torch.float32:
            sums = torch.is_grad_enabled()  # of the softmax's rows, for the backward pass
            results = aten._scaled_dot_product_efficient_attention(q, k, v, None, sums, dropout_p, is_causal)
        else:
            results = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)
        out: Tensor = results[0]
        return out

    def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
        if device == "cuda" and training and p > 0:
            return torch.native_dropout(x, p, training)[0]
        return own_dropout(x, p, training)

    functional: Any = F
    own_attention, own_dropout = F.scaled_dot_product_attention, F.dropout
    functional.scaled_dot_product_attention, functional.dropout = attention, dropout
    try:
        norms: Any = _NormsOfCPU if device == "cpu" else contextlib.nullcontext
        with norms():
            yield
    finally:
        functional.scaled_dot_product_attention, functional.dropout = own_attention, own_dropout


class _NormsOfCPU(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Layer norms keep mean and deviation in the dtype of their weights, as on a CPU; on meta tensors they are CUDA's.

    CUDA keeps them in fp32 (PyTorch 2.13, aten/src/ATen/native/layer_norm.cpp and cuda/layer_norm_kernel.cu).
    """

    def __torch_dispatch__(self, operation: Any, _: Any, arguments: Any = (), named: Any = None) -> Any:
        result = operation(*arguments, **(named or {}))
        if operation is not aten.native_layer_norm.default:
            return result
        out, *statistics = result
        return out, *(numbers.to(out.dtype) for numbers in statistics)


@contextlib.contextmanager
def built_on_meta(dtype: str) -> Iterator[None]:
    """Meanwhile modules are built on meta and in this dtype."""
    earlier = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(earlier)


def saved_bytes(config: GPT2Config, recompute: str, dtype: str, micro_batch: int, context: int) -> int:
    """Bytes that all blocks together keep from the forward to the backward pass.

    Counted at the end of the forward pass, less what a model without blocks keeps: embedding, last norm and weights
    drop out.
    """
    empty = replace(config, n_layers=0)
    return _kept_bytes(config, recompute, dtype, micro_batch, context) - _kept_bytes(
        empty, "none", dtype, micro_batch, context
    )


def _kept_bytes(config: GPT2Config, recompute: str, dtype: str, micro_batch: int, context: int) -> int:
    live = LiveBytes(device="meta", rounding=1)
    # What goes to host memory must not be real either: a meta tensor cannot be copied to a real one.
    with FakeTensorMode(), kernels_of("cuda"), live:
        with built_on_meta(dtype):
            model = GPT2(config, recompute=recompute)
            ids = torch.zeros(micro_batch, context, dtype=torch.long)
        for tensor in (ids, *model.parameters()):
            live.touch(tensor)
        before = live.current_bytes
        hidden = model.hidden(ids)
        kept = live.current_bytes - before
    del hidden
    return kept


def loss_peak_bytes(config: GPT2Config, dtype: str, tokens: int, loss_chunk: int | None) -> int:
    """The most that head and loss take, forward and backward, beyond the hidden states and the head's weight.

    loss_chunk None: all logits at once, as torch's own cross-entropy has it.
    """
    with built_on_meta(dtype):
        hidden = torch.empty(tokens, config.emb_dim).requires_grad_()
        weight = torch.empty(config.vocab_size, config.emb_dim).requires_grad_()
        targets = torch.empty(tokens, dtype=torch.long)
    live = LiveBytes(device="meta", rounding=1)
    with live:
        for tensor in (hidden, weight, targets):
            live.touch(tensor)
        before = live.current_bytes
        live.begin("loss")
        if loss_chunk is None:
            loss = whole_cross_entropy(hidden, weight, targets)
        else:
            loss = chunked_cross_entropy(hidden, weight, targets, loss_chunk)
        loss.backward()  # type: ignore[no-untyped-call]
    return live.peak_bytes - before
