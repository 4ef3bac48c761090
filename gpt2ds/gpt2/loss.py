"""Cross-entropy of the tied head without ever holding the logits of a whole batch.

For every chunk of tokens the logits, the loss and their gradients are computed at once, in the forward pass, and the
logits are dropped. A batch of 8 x 1,024 tokens has 1.6 GB of fp32 logits; a chunk of 1,024 tokens has 0.2 GB.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def whole_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same loss with all logits at once: the reference that the tests compare with. Shapes as below."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Mean cross-entropy in nats (scalar, fp32) of hidden (N, d) @ weight (V, d)^T against targets (N).

    The softmax runs in fp32 over logits in the dtype of `hidden`. `chunk` is the number of tokens whose logits exist at
    the same time; it changes memory and speed, and the result by rounding only: in bf16 the weight's gradient is summed
    over the chunks in bf16, off by 0.16% with one chunk, 0.36% with 16 and 0.8% with 64.
    """
    assert chunk > 0, chunk
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, chunk, torch.is_grad_enabled()
    )
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, with_gradients: bool) -> Tensor:
        tokens, vocab_size, dtype = hidden.shape[0], weight.shape[0], hidden.dtype
        chunk = min(chunk, tokens)
        # Rows padded to a multiple of 64 columns: products into rows of 50,257 numbers, an odd count, are slow on every
        # device. The buffers serve all chunks: on a CPU fresh pages for each would cost a third of the products' time.
        width = -(-vocab_size // 64) * 64
        scores = hidden.new_empty(chunk, width, dtype=torch.float32)
        logits = scores if dtype == torch.float32 else hidden.new_empty(chunk, width)
        total = scores.new_zeros(())
        if with_gradients:
            grad_hidden = torch.empty_like(hidden)
            # fp16 sums of this many terms could pass 65,504, out of reach of the loss scale: those are kept in fp32.
            grad_weight = torch.zeros_like(weight, dtype=torch.float32 if dtype == torch.float16 else None)
        for start in range(0, tokens, chunk):
            part = hidden[start : start + chunk]  # (C, d)
            target = targets[start : start + chunk].unsqueeze(1)  # (C, 1)
            log_p, slope = scores[: len(part)], logits[: len(part), :vocab_size]  # (C, width), (C, V)
            torch.mm(part, weight.t(), out=slope)
            if logits is not scores:
                log_p[:, :vocab_size] = slope
            log_p[:, vocab_size:] = float("-inf")  # the padding has probability 0
            torch.log_softmax(log_p, dim=1, out=log_p)
            total -= log_p.gather(1, target).sum()
            if not with_gradients:
                continue
            # d loss / d logits = softmax - one-hot, not yet divided by N: in fp16 that quotient would underflow.
            log_p.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
            if logits is not scores:
                slope.copy_(log_p[:, :vocab_size])
            torch.mm(slope, weight, out=grad_hidden[start : start + chunk])
            if grad_weight.dtype == dtype:
                grad_weight.addmm_(slope.t(), part)
            else:
                grad_weight += slope.t() @ part
        if with_gradients:
            ctx.save_for_backward(grad_hidden, grad_weight)
        return total / tokens

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0] / grad_hidden.shape[0]
        return grad_hidden.mul_(scale), grad_weight.mul_(scale).to(grad_hidden.dtype), None, None, None
