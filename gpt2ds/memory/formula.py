"""The closed form of a training run's memory on one GPU: every byte by name, and the phase in which they add up to the
peak.

Units: bytes. d, L, H, V are the model's width, layers, heads and vocabulary; N = micro-batch x context tokens; s the
bytes of a number in the compute dtype, a in the sums of gradients; P all parameters; W ranks. References are to
deepspeed 0.19.8: s12 = runtime/zero/stage_1_and_2.py, z3 = runtime/zero/stage3.py.

How far it is from the traced engine stands in benchmarks/results/formula_accuracy.json. No figure here was measured on
a GPU yet.
"""

from dataclasses import dataclass

from gpt2ds.gpt2.policies import saved_bytes_per_token
from gpt2ds.memory.backward import WORKING_SET, Moment, gradient_course
from gpt2ds.memory.gathering import gathered_bytes
from gpt2ds.memory.setting import MemorySetting

MIB = 2**20

# Token ids and targets, 8 bytes each.
TOKEN_ID_BYTES = 16

Parts = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The predicted peak of one GPU from the second step on (the first step's transients are smaller)."""

    peak_bytes: int
    phase: str
    """Where the peak is: loss, backward, tied embedding, or step."""
    parts: dict[str, int]
    """What lives at the peak, by name; the sum is peak_bytes."""


def predict(setting: MemorySetting) -> Estimate:
    """The peak over all phases of a training step, as torch.cuda.max_memory_allocated would show it."""
    phases = dict([("loss", _loss(setting)), _backward(setting)]) | _step(setting)
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    parts = {name: int(size) for name, size in phases[phase].items() if int(size)}
    return Estimate(peak_bytes=sum(parts.values()), phase=phase, parts=parts)


def states_of(setting: MemorySetting) -> Parts:
    """What lives through the whole step: weights, master weights, moments, staging buffers."""
    s, P, stage, share = setting.dtype_bytes, setting.model.parameters, setting.zero_stage, _share(setting)
    parts: Parts = {"weights": s * P, "workspace": setting.workspace_bytes}
    if stage == 3:
        parts["weights"] = 0 if setting.offload_param else s * share
    if setting.offload_optimizer:
        if stage < 3:
            parts["offload staging"] = s * largest_parameter(setting)  # s12:659
    else:
        # With fp32 weights ZeRO keeps a second copy of them (z3:1162 never fires; the same in s12).
        parts["master weights"] = setting.master_bytes * share if stage or s == 2 else 0
        parts["moments"] = setting.moment_bytes * share
    return parts


def _loss(setting: MemorySetting) -> Parts:
    """The end of the forward pass, where the loss and its gradients are computed chunk by chunk (gpt2/loss.py)."""
    model, s, N = setting.model, setting.dtype_bytes, setting.tokens
    d, V = model.emb_dim, model.vocab_size
    chunk = min(setting.loss_chunk, N)
    course = gradient_course(setting)
    return states_of(setting) | {
        "gradients": course.held_before_bytes,
        "reduce buckets": course.bucket_before_bytes,
        "gathered weights": gathered_bytes(setting, model.n_layers),
        "token ids": TOKEN_ID_BYTES * N,
        # The last residual, its norm and the norm's statistics come after the blocks.
        "activations": model.n_layers * _kept_by_a_block(setting) + N * (2 * s * d + 8) + _first_mask(setting),
        # In fp32, where the softmax is taken in place, and in the compute dtype; rows padded to 64.
        "logits of a chunk": (4 + s if s == 2 else 4) * -(-V // 64) * 64 * chunk,
        # fp16 sums this gradient in fp32 and has a chunk's product beside the sum.
        "head gradient": s * V * d * (3 if setting.dtype == "fp16" else 1),
        "gradient of the last hidden states": s * d * N,
    }


def _backward(setting: MemorySetting) -> tuple[str, Parts]:
    """The moment of the backward pass in which most is live."""
    model, s, N = setting.model, setting.dtype_bytes, setting.tokens
    d, H = model.emb_dim, model.n_heads
    kept = _kept_by_a_block(setting)
    # Statistics of norms and softmax; of dropout's two masks the last one is used up at once.
    beside = (4 * H + 16 + (d if model.drop_rate else 0)) * N
    # Flash attention's backward keeps fp32 sums of the query gradient and the softmax's row sums.
    inside_attention = (4 * d + 4 * H) * N

    def working_set(moment: Moment) -> float:
        if moment.block is None:
            return 0.0
        tensors = WORKING_SET[moment.at]
        if model.drop_rate and moment.at in ("out product", "proj product"):
            tensors += 1  # the gradient before dropout, beside the one that goes on to the residual
        return tensors * s * d * N + beside + (inside_attention if moment.at == "attention" else 0)

    def live(moment: Moment) -> float:
        below = (moment.block or 0) * kept
        gathered = gathered_bytes(setting, moment.block or 0)
        return below + working_set(moment) + moment.gradient_bytes + moment.bucket_bytes + gathered

    moment = max(gradient_course(setting).moments, key=live)
    below = (moment.block or 0) * kept
    own = min(kept, working_set(moment)) if moment.block is not None else 0
    phase = moment.at if moment.block is None else f"backward of block {moment.block}"
    return phase, states_of(setting) | {
        "gathered weights": gathered_bytes(setting, moment.block or 0),
        "token ids": TOKEN_ID_BYTES * N,
        "activations": below + own + _first_mask(setting),
        "working set of a block": working_set(moment) - own,
        "gradients": moment.held_bytes,
        "head gradient": moment.head_bytes,
        "gradient in flight": moment.in_flight_bytes,
        "reduce buckets": moment.bucket_bytes,
    }


def _step(setting: MemorySetting) -> dict[str, Parts]:
    """The optimizer step with the fused AdamW, which has no temporaries of its own."""
    if setting.offload_optimizer:
        return {}
    s, a, stage = setting.dtype_bytes, setting.accumulate_bytes, setting.zero_stage
    P, share = setting.model.parameters, _share(setting)
    upcast = 4 if s == 2 and setting.master_bytes == 4 else 0
    course = gradient_course(setting)
    parts = states_of(setting)
    if stage == 0:
        parts |= {"gradients": s * P, "fp32 gradients for the step": upcast * P}  # unfused_optimizer.py
    elif stage == 3:
        tile = min(setting.sub_group_elements, share)
        copies = (a if a == s else 0) + upcast  # a flat copy and one in fp32 (z3:2686)
        norm = 8 * course.largest_own_elements  # in fp64, one tensor at a time
        parts |= {"gradients": a * share, "step buffers": max(norm, copies * tile)}
        parts["reduce buckets"] = course.bucket_before_bytes
    elif setting.has_bf16_optimizer:
        parts["gradients"] = course.held_before_bytes
    elif a > s:
        parts["gradients"] = a * share
    else:
        # Averaged gradients, their flat copy, and the copy in fp32 (s12:3117).
        parts |= {"gradients": s * course.share_elements, "step buffers": (s + upcast) * share}
    return {"step": parts}


def _share(setting: MemorySetting) -> float:
    """Elements whose optimizer states are on this rank."""
    return setting.model.parameters / (setting.ranks if setting.zero_stage else 1)


def _kept_by_a_block(setting: MemorySetting) -> int:
    return setting.tokens * saved_bytes_per_token(setting.model, setting.dtype_bytes, setting.recompute)


def _first_mask(setting: MemorySetting) -> int:
    """Dropout behind the embeddings keeps its mask to the very end."""
    return setting.tokens * setting.model.emb_dim if setting.model.drop_rate else 0


def largest_parameter(setting: MemorySetting) -> float:
    """Numbers in the largest tensor: the token embedding, or an MLP's matrix where the vocabulary is small."""
    model = setting.model
    return max(model.vocab_size * model.emb_dim, 4 * model.emb_dim**2)
