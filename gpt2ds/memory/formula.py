"""The closed form of a training run's memory on one GPU: every byte by name, and the phase in which they add up to the
peak.

Units: bytes. d, L, H, V are the model's width, layers, heads and vocabulary; N = micro-batch x context tokens; s the
bytes of a number in the compute dtype; P all parameters; W ranks. "facts" in a comment means DeepSpeed 0.19.8's own
source: s12 = runtime/zero/stage_1_and_2.py, z3 = runtime/zero/stage3.py.

ZeRO-0, 1 and 2, also with offload, follow the traced engine term by term. ZeRO-3 on several ranks is an estimate so
far, within about 1.2% of the trace: live parameters are taken at their configured limit. No figure here was measured on
a GPU yet.
"""

from dataclasses import dataclass

from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.gpt2.policies import saved_bytes_per_token

MIB = 2**20

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

# cuBLAS takes a workspace through the caching allocator for each thread that multiplies: forward and autograd, 8.125
# MiB each on consumer cards plus 1 MiB of cuBLASLt (PyTorch, aten/src/ATen/cuda/CublasHandlePool.cpp). On H100 and H200
# it is 66 MiB.
CUBLAS_WORKSPACE_BYTES = 18 * MIB


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySetting:
    """What the memory of a run depends on; the fields of a plan that concern it."""

    model: GPT2Config
    context: int
    micro_batch: int
    accumulation: int
    ranks: int
    zero_stage: int
    dtype: str
    grad_accum_dtype: str
    recompute: str = "none"
    loss_chunk: int = 1024
    reduce_bucket_elements: int = 20_000_000
    overlap_comm: bool = False
    offload_optimizer: bool = False
    offload_param: bool = False
    live_parameter_elements: int = 100_000_000
    """ZeRO-3: most parameters gathered at once (stage3_max_live_parameters plus the prefetch bucket)."""
    sub_group_elements: int = 1_000_000_000
    """ZeRO-3: parameters that one tile of the optimizer step covers."""
    master_bytes: int = 4
    """Of each parameter in the optimizer's own weights; 2 under bf16_master_weights_and_grads."""
    moment_bytes: float = 8
    """Of each parameter's two moments; 4 under bf16_optimizer_states, 2 and their scales in 8 bits."""


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
    phases = _forward_backward(setting) | _step(setting)
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    parts = {name: int(size) for name, size in phases[phase].items() if int(size)}
    return Estimate(peak_bytes=sum(parts.values()), phase=phase, parts=parts)


def _states(setting: MemorySetting) -> dict[str, float]:
    """What lives through the whole step: weights, master weights, moments, persistent buffers."""
    s, P, W = DTYPE_BYTES[setting.dtype], setting.model.parameters, setting.ranks
    stage = setting.zero_stage
    share = P / W if stage else P
    parts: dict[str, float] = {"weights": s * P, "workspace": CUBLAS_WORKSPACE_BYTES}
    if stage == 3:
        gathered = min(P, setting.live_parameter_elements)
        parts["weights"] = 0 if setting.offload_param else s * share
        parts["gathered weights"] = s * gathered if W > 1 or setting.offload_param else 0
        # Made at start-up and kept (facts: z3:782).
        parts["reduce buckets"] = s * setting.reduce_bucket_elements
    if setting.offload_optimizer:
        if stage < 3:
            parts["offload staging"] = s * largest_parameter(setting)  # facts: s12:659
    else:
        # With fp32 weights ZeRO keeps a second copy of them (facts: z3:1162 never fires; the same in s12).
        parts["master weights"] = setting.master_bytes * share if stage or s == 2 else 0
        parts["moments"] = setting.moment_bytes * share
    return parts


def _gradients(setting: MemorySetting) -> tuple[float, float]:
    """(kept from earlier micro-batches, added while a backward pass runs) bytes of reduced gradients."""
    s, P, W = DTYPE_BYTES[setting.dtype], setting.model.parameters, setting.ranks
    a = DTYPE_BYTES[setting.grad_accum_dtype]
    later = setting.accumulation > 1
    match setting.zero_stage:
        case 0:
            return (s * P, 0) if later else (0, s * P)
        case 1 if _has_bf16_optimizer(setting):
            return 4 * P, 0  # one fp32 buffer for all gradients (facts: bf16_optimizer.py:191)
        case 1 if not setting.offload_optimizer:
            return (a * P, 0) if later else (0, s * P)
        case 3:
            return (0 if setting.offload_optimizer else a * P / W), 0  # facts: z3:791
        case _ if setting.offload_optimizer:
            return (4 * P / W if a > s else 0), 0
        case _ if a > s:
            return (a * P / W, 0) if later else (0, a * P / W)  # accumulated in place (facts: s12:1270)
        case _:
            return (s * P / W if later else 0), s * P / W  # the old and the new sum side by side (facts: s12:1039)


def _forward_backward(setting: MemorySetting) -> dict[str, dict[str, float]]:
    model = setting.model
    d, H, L, V = model.emb_dim, model.n_heads, model.n_layers, model.vocab_size
    s, N = DTYPE_BYTES[setting.dtype], setting.micro_batch * setting.context
    per_block = N * saved_bytes_per_token(model, s, setting.recompute)
    ids = 16 * N
    head_gradient = s * V * d
    kept, added = _gradients(setting)
    always = _states(setting) | {"gradients": kept, "token ids": ids}

    bucket = 0.0
    if setting.zero_stage == 1 and kept and not _has_bf16_optimizer(setting):
        # Kept between micro-batches, in the type of the sums.
        always["reduce buckets"] = DTYPE_BYTES[setting.grad_accum_dtype] * setting.reduce_bucket_elements
    elif setting.zero_stage in (1, 2):
        # Allocated in full at the first gradient of every backward pass (facts: s12:3266).
        bucket = float(s * setting.reduce_bucket_elements * (2 if setting.overlap_comm else 1))

    chunk = min(setting.loss_chunk, N)
    tail = N * (2 * s * d + 8)  # the last residual, its norm and the norm's statistics
    # fp16 sums this gradient in fp32 and has a chunk's product beside the sum.
    head_sum = head_gradient * (3 if setting.dtype == "fp16" else 1)
    phases: dict[str, dict[str, float]] = {
        "loss": always
        | {
            "activations": L * per_block + tail,
            # In fp32, where the softmax is taken in place, and in the compute dtype; rows padded to 64 (gpt2/loss.py).
            "logits of a chunk": (4 + s if s == 2 else 4) * -(-V // 64) * 64 * chunk,
            "head gradient": head_sum,
            "gradient of the last hidden states": s * d * N,
        }
    }

    # From the last block to the first: activations go, gradients come.
    for block in range(L - 1, -1, -1):
        reduced = (L - 1 - block) * model.block_parameters
        if setting.zero_stage == 0 or (setting.zero_stage == 1 and bucket == 0):
            arrived = min(added, s * reduced)
        else:
            arrived = added if reduced + 4 * d * d > setting.reduce_bucket_elements else 0.0
        # What the second forward of this block brings back.
        rebuilt = N * saved_bytes_per_token(model, s, "none") - per_block
        gelu = rebuilt + N * 5 * s * d
        # Flash attention's backward keeps fp32 sums of the query gradient and the softmax's row sums.
        attention = rebuilt + N * (-5 * s * d + 4 * d + 4 * H)
        phases[f"backward of block {block}"] = always | {
            "activations": (block + 1) * per_block,
            "working set of a block": max(gelu, attention, 0),
            "head gradient": head_gradient,
            "gradient in flight": 4 * s * d * d,
            "reduce buckets": always.get("reduce buckets", 0) + bucket,
            "gradients": kept + arrived,
        }
    # The head's and the embedding's gradient of the tied weight, and their sum.
    phases["tied embedding"] = always | {
        "head gradient": 3 * head_gradient,
        "reduce buckets": always.get("reduce buckets", 0) + bucket,
        "gradients": kept + max(0.0, added - (head_gradient if setting.zero_stage == 0 else 0)),
    }
    return phases


def _step(setting: MemorySetting) -> dict[str, dict[str, float]]:
    """The optimizer step with the fused AdamW, which has no temporaries of its own."""
    if setting.offload_optimizer:
        return {}
    s, P, W = DTYPE_BYTES[setting.dtype], setting.model.parameters, setting.ranks
    a, stage = DTYPE_BYTES[setting.grad_accum_dtype], setting.zero_stage
    share = P / W if stage else P
    largest = min(largest_parameter(setting), share)
    parts = _states(setting)
    norm = 8 * largest  # the norm is summed in fp64, one parameter at a time (facts: s12:2684)
    if stage == 0:
        upcast = 4.0 * P if s == 2 else 0.0  # facts: unfused_optimizer.py
        return {"step": parts | {"gradients": s * P, "fp32 gradients for the step": upcast, "gradient norm": 0}}
    if stage == 3:
        tile = min(setting.sub_group_elements, share)
        copies = (a if a == s else 0) + (4 if setting.master_bytes == 4 else 0)  # flat copy and fp32 copy (z3:2686)
        return {"step": parts | {"gradients": a * share, "step buffers": max(norm, copies * tile)}}
    if _has_bf16_optimizer(setting):
        return {"step": parts | {"gradients": 4 * P, "gradient norm": norm}}
    if a > s:
        return {"step": parts | {"gradients": a * share, "gradient norm": norm}}
    # Averaged gradients, their flat copy, and the copy in fp32 (facts: s12:3117).
    upcast = 4 * share if s == 2 and setting.master_bytes == 4 else 0.0
    return {"step": parts | {"gradients": s * share, "step buffers": max(s * share + upcast, norm)}}


def _has_bf16_optimizer(setting: MemorySetting) -> bool:
    """DeepSpeed trains ZeRO-1 in bf16 with fp32 sums by an optimizer class of its own (facts: engine.py:2305)."""
    return setting.zero_stage == 1 and setting.dtype == "bf16" and setting.grad_accum_dtype == "fp32"


def largest_parameter(setting: MemorySetting) -> float:
    """Numbers in the largest tensor: the token embedding, or an MLP's matrix where the vocabulary is small."""
    model = setting.model
    return max(model.vocab_size * model.emb_dim, 4 * model.emb_dim**2)
