"""Why mixed precision did not reduce the memory: fp32, autocast and true 16 bits side by side, by formula.

`torch.autocast` leaves weights, gradients and Adam's moments in fp32 (16 bytes a parameter) and adds a bf16 copy of
every weight that multiplies; norms, softmax and loss run in fp32, and without a fused attention kernel the attention
matrices (T x T for each head) are kept in both types. Units and letters as in `formula`.

Checked against traces of a plain PyTorch GPT-2 with AdamW on tensors without data (gpt2_large with a bias on queries,
keys and values), fp32 and autocast: within 0.1%. Autocast was emulated there, and the rows in 16 bits, whose states are
the formula's, have no trace behind them. Nothing here was measured on a GPU.
"""

from dataclasses import dataclass, replace

from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.gpt2.policies import saved_bytes_per_token
from gpt2ds.memory.backward import gradient_course
from gpt2ds.memory.fit import MICRO_BATCH_MOST, last_true, tensor_bytes
from gpt2ds.memory.formula import states_of
from gpt2ds.memory.setting import MemorySetting

PRECISIONS = ("fp32", "autocast", "16 bits")

CAST_WEIGHTS = "bf16 copies of the weights"

# Bytes of each element of an attention matrix that wait for the backward pass. fp32: the softmax's result, which the
# product with the values needs as well. autocast: the same, and its bf16 copy for the product.
_ATTENTION_MATRIX_BYTES = {"fp32": 4, "autocast": 6, "16 bits": 2}

# log_softmax's result, its gradient and the gradient of the logits, all in fp32, for every token of a micro-batch.
_LOGIT_BYTES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainPeak:
    """One way to train without this program's loss and recompute policies, whole logits in fp32."""

    precision: str
    fused_attention: bool
    peak_bytes: int
    parts: dict[str, int]
    largest_micro_batch: int


def compare(setting: MemorySetting, device_bytes: int) -> list[PlainPeak]:
    """Each precision with and without a fused attention kernel, at the setting's micro-batch.

    fp32 and autocast: plain PyTorch with AdamW. 16 bits: the setting's own states (ZeRO stage, ranks, offload).
    """
    found = []
    for precision in PRECISIONS:
        for fused in (False, True):

            def holds(micro_batch: int, precision: str = precision, fused: bool = fused) -> bool:
                parts = plain_parts(replace(setting, micro_batch=micro_batch), precision, fused_attention=fused)
                return sum(parts.values()) <= tensor_bytes(device_bytes)

            parts = plain_parts(setting, precision, fused_attention=fused)
            found.append(
                PlainPeak(
                    precision=precision,
                    fused_attention=fused,
                    peak_bytes=sum(parts.values()),
                    parts=parts,
                    largest_micro_batch=last_true(holds, MICRO_BATCH_MOST),
                )
            )
    return found


def plain_parts(setting: MemorySetting, precision: str, *, fused_attention: bool) -> dict[str, int]:
    """What lives at the peak of a plain training step, by name: at the loss, or when all gradients are there."""
    model, T = setting.model, setting.context
    d, H, L, V = model.emb_dim, model.n_heads, model.n_layers, model.vocab_size
    N = setting.micro_batch * T
    states = _states(setting, precision)
    kept = _saved_bytes_per_token(model, precision)
    matrices = 0
    if not fused_attention:
        kept -= 4 * H  # the softmax's sums, which only a fused kernel keeps
        # The mask is one byte an element, made anew in every block.
        matrices = L * (setting.micro_batch * H * T * T * _ATTENTION_MATRIX_BYTES[precision] + T * T)
    tail = {"fp32": 8 * d, "autocast": 6 * d, "16 bits": 4 * d}[precision] + 8 + 16
    at_loss = states | {
        "activations": N * (L * kept + tail),
        "attention matrices": matrices,
        "logits": _LOGIT_BYTES * V * N,
    }
    # The head's gradient of the tied weight waits for the embedding's, which autograd adds to it in place.
    s = 2 if precision == "16 bits" else 4
    gradients = states.get("gradients", 0) + s * model.parameters
    at_end = states | {"gradients": gradients, "tied embedding": s * V * d}
    at_end.pop(CAST_WEIGHTS, None)  # they go with the activations
    parts = max(at_loss, at_end, key=lambda phase: sum(phase.values()))
    return {name: int(size) for name, size in parts.items() if int(size)}


def _states(setting: MemorySetting, precision: str) -> dict[str, float]:
    model = setting.model
    P = model.parameters
    if precision != "16 bits":
        states: dict[str, float] = {"weights": 4 * P, "moments": 8 * P}
        if setting.accumulation > 1:
            states["gradients"] = 4 * P
        if precision == "autocast":
            # Of everything that goes through F.linear: all but positions, norms and the biases' few numbers.
            states[CAST_WEIGHTS] = 2 * (P - model.context_length * model.emb_dim)
        return states
    if setting.dtype == "fp32":
        setting = replace(setting, dtype="bf16", grad_accum_dtype="fp32" if setting.zero_stage else "bf16")
    held = gradient_course(setting).held_before_bytes
    return states_of(replace(setting, workspace_bytes=0)) | ({"gradients": held} if held else {})


def _saved_bytes_per_token(model: GPT2Config, precision: str) -> int:
    """What a block keeps for its backward pass without recompute. Autocast: the residual, which both norms read, in
    fp32, the rest in bf16: 36 d.
    """
    if precision == "autocast":
        return 36 * model.emb_dim + 4 * model.n_heads + 16
    return saved_bytes_per_token(replace(model, drop_rate=0.0), 4 if precision == "fp32" else 2, "none")
