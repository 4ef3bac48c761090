"""What every rank sends in one optimizer step, by ZeRO stage: the other half of the choice between stages.

With rings, as NCCL and gloo build them: an all-reduce of n bytes makes each of W ranks send 2 (W-1)/W n, a gather or a
scatter (W-1)/W n. Which collectives DeepSpeed 0.19.8 runs, how often and in which type, was counted with its own
communication log on two ranks (`benchmarks/communication.py`).
"""

from dataclasses import dataclass

from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.memory.setting import DTYPE_BYTES, MemorySetting

# ZeRO-3 keeps smaller tensors whole on every rank: stage3_param_persistence_threshold, as shipped and by default.
PERSISTENT_ELEMENTS = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes that each rank sends in one optimizer step."""

    gradients: int
    weights: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.gradients + self.weights


def traffic(
    setting: MemorySetting, *, gradient_bytes: int | None = None, persistent_elements: int = PERSISTENT_ELEMENTS
) -> Traffic:
    """What a rank sends in a step; nothing when it is alone.

    gradient_bytes: of each gradient on its way (communication_data_type); None for the weights' own type.
    ZeRO-0 and 1 reduce once a step, ZeRO-2 and 3 once a micro-batch; ZeRO-2's buckets cross the link as an all-reduce
    (stage_1_and_2.py, use_multi_rank_bucket_allreduce), twice what a reduce-scatter would send. ZeRO-3 gathers weights
    in forward and again in backward unless all of them may stay, and small tensors once a step; a recompute policy adds
    up to 4% to that, which is left out.
    """
    s, P, W = DTYPE_BYTES[setting.dtype], setting.model.parameters, setting.ranks
    g = gradient_bytes or s
    ring = (W - 1) / W
    match setting.zero_stage:
        case 0:
            gradients, weights = 2 * g * P, 0
        case 1:
            gradients, weights = 2 * g * P, s * P
        case 2:
            gradients, weights = 2 * g * P * setting.accumulation, s * P
        case _:
            kept = persistent_parameters(setting.model, persistent_elements)
            passes = 1 if setting.live_parameter_elements >= P else 2
            gradients = g * P * setting.accumulation
            weights = s * (kept + (P - kept) * passes * setting.accumulation)
    return Traffic(gradients=int(ring * gradients), weights=int(ring * weights))


def persistent_parameters(model: GPT2Config, threshold: int) -> int:
    """Parameters in tensors of fewer than `threshold` elements, which ZeRO-3 does not divide."""
    d = model.emb_dim
    matrices = [model.vocab_size * d, model.context_length * d]
    matrices += model.n_layers * [3 * d * d, d * d, 4 * d * d, 4 * d * d]
    # Everything else are norms and biases, far below any threshold but 0.
    return model.parameters - sum(size for size in matrices if size >= threshold) if threshold else 0
