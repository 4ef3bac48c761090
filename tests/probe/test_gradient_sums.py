"""Watching a backward pass must not change where its sums of gradients lie."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2ds.probe.live import LiveBytes

kept: list[Tensor] = []


class Given(torch.autograd.Function):
    """Hands back a gradient of its own making, and shows it to `see`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, see: Callable[[Tensor], None]) -> Tensor:
        ctx.see = see
        return x * 1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0] * 2
        ctx.see(gradient)
        return gradient, None


def summed_in_place(see: Callable[[Tensor], None], *, watched: bool) -> bool:
    """Whether the sum of two gradients of one weight lies where the first of them did."""
    places: list[int] = []

    def look(gradient: Tensor) -> None:
        places.append(gradient.data_ptr())
        see(gradient)

    weight = torch.ones(1000, requires_grad=True)
    with LiveBytes(device="cpu") if watched else contextlib.nullcontext():
        early = weight.sin()
        (Given.apply(weight, look) + early).sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, 2 + torch.ones(1000).cos())
    return weight.grad.data_ptr() == places[0]


@pytest.mark.parametrize("watched", [False, True])
def test_a_gradient_of_which_nobody_else_knows_is_added_to(watched: bool) -> None:
    assert summed_in_place(lambda _: None, watched=watched)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("keep", [kept.append, lambda gradient: kept.append(gradient[:10])], ids=["itself", "a view"])
def test_a_gradient_that_somebody_keeps_is_left_alone(keep: Callable[[Tensor], None], watched: bool) -> None:
    kept.clear()
    assert not summed_in_place(keep, watched=watched)
    assert (kept[0] == 2).all()


def test_other_sums_in_the_backward_pass_are_new_tensors() -> None:
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] * 2 + gradients[0] * 3

    live = LiveBytes(device="cpu", rounding=1)
    weight = torch.ones(1000, requires_grad=True)
    with live:
        loss = Sum.apply(weight).sum()
        live.begin("backward")
        loss.backward()
    assert live.finish()[-1].peak_bytes >= 4 * 4000  # the weight, the two terms, and their sum
    assert weight.grad is not None and (weight.grad == 5).all()
