"""Activation checkpointing: what a block keeps for the backward pass, and what it computes again instead."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.gpt2.policies import POLICIES, PRODUCTS, kept_products

Layer = Callable[[Tensor], Tensor]

aten = torch.ops.aten

ATTENTION_KERNELS = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}

# Where the weight, transposed to (in, out), stands among the arguments of a matrix product.
WEIGHT_ARGUMENT = {aten.mm.default: 1, aten.addmm.default: 2}


class Recompute:
    """Runs blocks under one of the policies of `gpt2.policies`."""

    def __init__(self, policy: str, config: GPT2Config) -> None:
        self.policy = POLICIES[policy]
        self.has_dropout = config.drop_rate > 0
        d = config.emb_dim
        self._kept_shapes = (
            {(d * PRODUCTS[name][0], d * PRODUCTS[name][1]) for name in kept_products(policy, config)}
            if self.policy
            else set()
        )

    def __call__(self, block: Layer, x: Tensor) -> Tensor:
        """block(x); x and the result are (B, T, d)."""
        if self.policy is None:
            return block(x)
        more: dict[str, Any] = {}
        if self.policy.keeps_attention:
            more["context_fn"] = partial(create_selective_checkpoint_contexts, self._decide)
        # The outer hooks see only the block's input, everything inside is the checkpoint's own.
        where = contextlib.nullcontext() if self.policy.keeps_input else torch.autograd.graph.save_on_cpu(True)
        with where:
            # Non-reentrant: it stops the second forward once the last needed tensor is there, and works under every
            # ZeRO stage. The random state, which costs a copy from the device, is kept only where dropout needs it.
            result: Tensor = checkpoint(block, x, use_reentrant=False, preserve_rng_state=self.has_dropout, **more)
        return result

    def _decide(self, _: Any, operation: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:
        position = WEIGHT_ARGUMENT.get(operation)
        if operation in ATTENTION_KERNELS or (
            position is not None and tuple(arguments[position].shape) in self._kept_shapes
        ):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE
