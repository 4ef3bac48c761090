"""The chunked loss against the loss over all logits at once."""

import pytest
import torch

from gpt2ds.gpt2.loss import chunked_cross_entropy, whole_cross_entropy


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def both(dtype: torch.dtype, tokens: int, chunk: int, scale: float = 1.0) -> list[tuple[torch.Tensor, ...]]:
    random = torch.manual_seed(0)
    hidden = torch.randn(tokens, 16, generator=random)
    weight = torch.randn(501, 16, generator=random)
    targets = torch.randint(0, 501, (tokens,), generator=random)
    results = []
    for loss_of in (whole_cross_entropy, lambda *inputs: chunked_cross_entropy(*inputs, chunk)):
        h, w = (tensor.to(dtype).requires_grad_() for tensor in (hidden, weight))
        loss = loss_of(h, w, targets)
        (loss * scale).backward()
        results.append((loss.detach(), h.grad, w.grad))
    return results


@pytest.mark.parametrize("chunk", [1, 7, 16, 31, 32, 33, 1000])
@pytest.mark.parametrize("scale", [1.0, 1024.0, 0.25])
def test_equal_in_fp32_whatever_the_chunk(chunk: int, scale: float) -> None:
    whole, chunked = both(torch.float32, 32, chunk, scale)
    for a, b in zip(chunked, whole, strict=True):
        assert relative(a, b) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_close_in_16_bits_and_in_their_dtype(dtype: torch.dtype) -> None:
    whole, chunked = both(dtype, 64, 16)
    assert chunked[0].dtype == torch.float32
    assert relative(chunked[0], whole[0]) < 1e-3
    for a, b in zip(chunked[1:], whole[1:], strict=True):
        assert a.dtype == dtype
        assert relative(a, b) < 0.02


def test_fp16_gradients_survive_many_tokens() -> None:
    """A mean over many tokens has gradients below fp16's smallest number; the loss scale must find them still there."""
    random = torch.manual_seed(0)
    hidden = torch.randn(4096, 8, generator=random).half().requires_grad_()
    weight = (0.02 * torch.randn(5000, 8, generator=random)).half().requires_grad_()
    targets = torch.randint(0, 5000, (4096,), generator=random)
    scale = 2.0**14
    (chunked_cross_entropy(hidden, weight, targets, 512) * scale).backward()
    h32, w32 = (tensor.detach().float().requires_grad_() for tensor in (hidden, weight))
    whole_cross_entropy(h32, w32, targets).backward()
    assert relative(hidden.grad.float() / scale, h32.grad) < 0.01
    assert relative(weight.grad.float() / scale, w32.grad) < 0.01


def test_no_gradients_are_made_without_grad() -> None:
    hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, torch.randint(0, 11, (8,)), 4)
    assert not loss.requires_grad
    assert torch.isfinite(loss)


def test_non_finite_inputs_reach_the_loss_and_the_gradients() -> None:
    hidden = torch.randn(8, 4)
    hidden[3, 2] = float("nan")
    hidden.requires_grad_()
    weight = torch.randn(11, 4, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.randint(0, 11, (8,)), 4)
    loss.backward()
    assert not torch.isfinite(loss)
    assert not torch.isfinite(weight.grad).all()
