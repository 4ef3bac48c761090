"""What the scripts of several ranks share: their data, a position to save at, and numbers that go wrong."""

from typing import Any

import torch

from gpt2ds.corpus.batches import Batches, Windows
from gpt2ds.gpt2.model import GPT2
from gpt2ds.plan import Plan
from gpt2ds.training.engine import TrainingEngine
from gpt2ds.training.manifest import Position


def batches_of(plan: Plan, rank: int, ranks: int, micro_batch: int) -> Batches:
    """The plan's global batches, cut for so many ranks and this micro-batch."""
    return Batches(
        Windows(plan.corpus.train, plan.context),
        global_batch=plan.global_batch,
        micro_batch=micro_batch,
        rank=rank,
        ranks=ranks,
        seed=1,
    )


def weights_of(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    """A copy of the weights in the compute type on rank 0; nothing on the others, which must call it as well."""
    return {name: weight.clone() for name, weight in engine.gathered_weights() if weight is not None}


def position_at(step: int, *, skipped_steps: int = 0) -> Position:
    """A position of which only the steps matter."""
    return Position(
        step=step,
        sequences_seen=0,
        elapsed_seconds=0.0,
        skipped_steps=skipped_steps,
        returns=0,
        passed_over=[],
        learning_rate={},
        evaluate_every=None,
        speed_measured=False,
        schedule={},
        evaluated_at=0,
        val_loss=None,
        losses=[],
    )


POISONS = ("loss", "gradient", "data")


def poison(model: GPT2, kind: str) -> Any:
    """Puts a NaN into the loss, a gradient or the data path of this rank, until the handle's `remove`.

    "high": no NaN, but a loss that is 8 nats higher than it should be.
    """
    if kind == "gradient":
        return model.h[0].mlp.c_fc.weight.register_hook(lambda gradient: gradient * float("nan"))
    if kind == "high":
        return model.register_forward_hook(lambda module, inputs, loss: loss + 8)
    module = {"loss": model, "data": model.wte}[kind]
    return module.register_forward_hook(lambda module, inputs, output: output * float("nan"))
