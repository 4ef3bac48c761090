"""Activation checkpointing: what a block keeps for the backward pass, and what it computes again instead."""

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.gpt2.policies import POLICIES, PRODUCTS, keeps_attention, kept_products

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
        self.keeps_attention = keeps_attention(policy, config)
        d = config.emb_dim
        kept = kept_products(policy, config)
        self.kept_shapes = {(d * PRODUCTS[name][0], d * PRODUCTS[name][1]) for name in kept}

    def __call__(self, block: Layer, x: Tensor) -> Tensor:
        """block(x); x and the result are (B, T, d)."""
        if self.policy is None:
            return block(x)
        more: dict[str, Any] = {}
        if self.kept_shapes or self.keeps_attention:
            more["context_fn"] = self._contexts
        # The outer hooks see only the block's input, everything inside is the checkpoint's own.
        where = contextlib.nullcontext() if self.policy.keeps_input else torch.autograd.graph.save_on_cpu(True)
        with where:
            # Non-reentrant: it stops the second forward once the last needed tensor is there, and works under every
            # ZeRO stage. The random state, which costs a copy from the device, is kept only where dropout needs it.
            result: Tensor = checkpoint(block, x, use_reentrant=False, preserve_rng_state=self.has_dropout, **more)
        return result

    def keeps(self, operation: Any, arguments: tuple[Any, ...]) -> bool:
        """Whether the result of this operation is kept for the second forward."""
        if operation in ATTENTION_KERNELS:
            return self.keeps_attention
        position = WEIGHT_ARGUMENT.get(operation)
        return position is not None and tuple(arguments[position].shape) in self.kept_shapes

    def _contexts(self) -> tuple["_Keeping", "_Replaying"]:
        kept: deque[Any] = deque()
        return _Keeping(self, kept), _Replaying(self, kept)


# Not torch's own pair of contexts (create_selective_checkpoint_contexts): it insists that both forwards run the very
# same operations, and ZeRO-3 fetches other weights on the way in the second one.


class _Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Around the first forward: stores the results that the policy keeps."""

    def __init__(self, recompute: Recompute, kept: "deque[Any]") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recompute = recompute
        self.kept = kept

    def __torch_dispatch__(self, operation: Any, _: Any, arguments: Any = (), named: Any = None) -> Any:
        result = operation(*arguments, **(named or {}))
        if self.recompute.keeps(operation, arguments):
            # Aliases: what is returned becomes a part of the graph, whose life must not be prolonged.
            self.kept.append(tree_map(lambda item: item.detach() if isinstance(item, Tensor) else item, result))
        return result


class _Replaying(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Around the second forward: gives the stored results back in the order in which they came."""

    def __init__(self, recompute: Recompute, kept: "deque[Any]") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recompute = recompute
        self.kept = kept

    def __torch_dispatch__(self, operation: Any, _: Any, arguments: Any = (), named: Any = None) -> Any:
        if self.recompute.keeps(operation, arguments):
            return self.kept.popleft()
        return operation(*arguments, **(named or {}))
