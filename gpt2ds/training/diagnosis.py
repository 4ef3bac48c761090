"""Why the numbers went wrong: the step's data once more with an eye on every tensor, when a run gives up."""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt2ds.training.engine import TrainingEngine, gather_objects
from gpt2ds.training.evaluation import to_device


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What was seen, over all ranks."""

    lr: float
    loss_scale: float | None
    bad_weights: tuple[str, ...]
    """Parameters that hold something not finite already before the step."""
    first_bad: str | None
    """The tensor that turned non-finite first: an output on the way forward, or a gradient on the way back."""
    gradient_norms: dict[str, float]
    """By layer, of one rank's micro-batches before they are averaged and clipped; the largest over the ranks."""

    def to_dict(self) -> dict[str, Any]:
        """For the log."""
        return asdict(self)

    def sentence(self) -> str:
        """For the log's reader."""
        if self.bad_weights:
            found = f"the weights {', '.join(self.bad_weights[:3])} are not finite any more"
        elif self.first_bad:
            found = f"the first tensor that is not finite is {self.first_bad}"
        else:
            found = "with the present weights every tensor of that step is finite"
        bad = [layer for layer, norm in self.gradient_norms.items() if not math.isfinite(norm)]
        finite = {layer: norm for layer, norm in self.gradient_norms.items() if math.isfinite(norm)}
        largest = sorted(finite, key=lambda layer: -finite[layer])[:3]
        norms = ", ".join(f"{layer} {finite[layer]:.3g}" for layer in largest)
        norms += f"{', ' if norms and bad else ''}not finite in {', '.join(bad)}" if bad else ""
        scale = f", loss scale {self.loss_scale:g}" if self.loss_scale else ""
        advice = "a lower --lr or a longer --warmup-steps is the first thing to try"
        return (
            f"Diagnosis: learning rate {self.lr:.3g}{scale}; {found}; "
            f"gradient norms by layer, the largest first: {norms}; {advice}."
        )


def diagnose(engine: TrainingEngine, windows: Iterable[np.ndarray], lr: float) -> Diagnosis:
    """Runs a step's micro-batches, each (B, T + 1), forward and back on every rank, and discards what comes out.

    The engine is not fit for training afterwards: the gradients of an unfinished window lie in it.
    """
    rank = engine.ranks.rank
    bad_weights = [name for name, weight in engine.gathered_weights() if weight is not None and not _finite(weight)]
    seen = _Seen()
    with ExitStack() as stack:
        for name, module in engine.module.named_modules():
            if name:
                stack.callback(module.register_forward_hook(seen.output_of(name)).remove)
        for name, parameter in engine.module.named_parameters():
            hook = parameter.register_hook(seen.gradient_of(name))  # type: ignore[no-untyped-call]
            stack.callback(hook.remove)
        for number, window in enumerate(windows):
            if number:
                engine.end_micro_step()
            loss = engine.micro_step(*to_device(window, engine.ranks.device))
            seen.note(f"the loss of micro-batch {number + 1}", loss)
    norms: dict[str, float] = {}
    found = gather_objects((rank, bad_weights, seen.first_bad, seen.norms()))
    for _, _, _, own in found:
        for layer, norm in own.items():
            norms[layer] = max(norms.get(layer, 0.0), norm) if math.isfinite(norm) else math.nan
    firsts = [(first, of) for of, _, first, _ in found if first]
    return Diagnosis(
        lr=lr,
        loss_scale=engine.loss_scale,
        bad_weights=tuple(found[0][1]),
        first_bad=f"{firsts[0][0]} on rank {firsts[0][1]}" if firsts else None,
        gradient_norms=norms,
    )


class _Seen:
    """What the hooks saw, in the order of computation."""

    def __init__(self) -> None:
        self.first_bad: str | None = None
        self._squares: dict[str, float] = {}

    def note(self, what: str, tensor: Any) -> None:
        if self.first_bad is None and isinstance(tensor, Tensor) and not _finite(tensor):
            self.first_bad = what

    def output_of(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.note(f"the output of {name}", output[0] if isinstance(output, tuple) else output)

        return hook

    def gradient_of(self, name: str) -> Any:
        layer = ".".join(name.split(".")[:2]) if name.startswith("h.") else name.split(".")[0]

        def hook(gradient: Tensor) -> None:
            self.note(f"the gradient of {name}", gradient)
            square = float(gradient.detach().double().norm()) ** 2
            self._squares[layer] = self._squares.get(layer, 0.0) + square

        return hook

    def norms(self) -> dict[str, float]:
        return {layer: math.sqrt(square) if square >= 0 else math.nan for layer, square in self._squares.items()}


def _finite(tensor: Tensor) -> bool:
    # Detached: within a recomputed block, what is saved for a backward pass is counted and must be the same twice.
    return bool(torch.isfinite(tensor.detach()).all())
