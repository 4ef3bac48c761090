"""The recompute policies: what a block keeps for its backward pass, in bytes and in arithmetic. No torch: the plan and
the memory formula need this in milliseconds.

A block multiplies four times: `qkv` (d to 3d), `proj` (d to d), `fc` (d to 4d) and `out` (4d to d). What is not kept is
computed again from the block's input; norms, GELU and sums are always computed again, they cost next to nothing.
"""

from dataclasses import dataclass

from gpt2ds.gpt2.config import GPT2Config

PRODUCTS = {"qkv": (1, 3), "proj": (1, 1), "fc": (1, 4), "out": (4, 1)}
"""Input and output width of each matrix product of a block, in multiples of d."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What is kept beside the block's input."""

    keeps: frozenset[str]
    """Outputs of matrix products that are kept."""
    keeps_attention: bool
    keeps_input: bool
    """False: even the block's input waits elsewhere, in pinned host memory."""


# Where the choice lies: bytes kept against arithmetic, from a trace of gpt2_large. Keeping every k-th block whole costs
# more of both than the policies between `none` and `full` do.
POLICIES: dict[str, Policy | None] = {
    "none": None,  # everything is kept and nothing computed again
    "products": Policy(keeps=frozenset({"qkv", "proj", "fc"}), keeps_attention=True, keeps_input=True),
    "alternate": Policy(keeps=frozenset({"qkv", "fc"}), keeps_attention=True, keeps_input=True),
    "narrow": Policy(keeps=frozenset({"qkv", "proj"}), keeps_attention=True, keeps_input=True),
    "attention": Policy(keeps=frozenset(), keeps_attention=True, keeps_input=True),
    "full": Policy(keeps=frozenset(), keeps_attention=False, keeps_input=True),
    "host": Policy(keeps=frozenset(), keeps_attention=False, keeps_input=False),
}


def kept_products(name: str, model: GPT2Config) -> frozenset[str]:
    """The products whose outputs are kept under the policy `name`, beside the backward pass's own of "none".

    The last product, `out`, is not needed in the backward pass, so its output is never worth its memory; except with
    dropout, whose mask is drawn after it: the second forward then runs through it, and keeping it saves 8 d² a token.
    """
    policy = POLICIES[name]
    if policy is None:
        return frozenset()
    return policy.keeps | {"out"} if policy.keeps and model.drop_rate else policy.keeps


def keeps_attention(name: str, model: GPT2Config) -> bool:
    """Whether the attention output is kept under the policy `name`.

    Not with dropout: the kernel draws from the random state, and a second forward that leaves it out would draw other
    masks than the first from there on.
    """
    policy = POLICIES[name]
    return policy is not None and policy.keeps_attention and not model.drop_rate


def saved_bytes_per_token(model: GPT2Config, dtype_bytes: int, recompute: str) -> int:
    """Bytes that one block keeps on the GPU for its backward pass, per token, with flash attention.

    none: the inputs of both norms, of the four products and of the activation, queries, keys, values and attention
    output make 16 d numbers; the norms' statistics and the softmax's sums (one a head) are fp32.
    """
    d, H, s = model.emb_dim, model.n_heads, dtype_bytes
    policy = POLICIES[recompute]
    if policy is None:
        masks = 2 * d if model.drop_rate else 0
        return 16 * s * d + 4 * H + 16 + masks
    kept = s * d * sum(PRODUCTS[product][1] for product in kept_products(recompute, model))
    if keeps_attention(recompute, model):
        kept += s * d + 4 * H
    return kept + s * d if policy.keeps_input else kept


def recomputed_flops_per_token(model: GPT2Config, recompute: str, context: int | None = None) -> float:
    """Floating-point operations per token that the policy adds to `GPT2Config.flops_per_token`, all blocks together.

    2 for each weight of a product that is computed again and 4·T·d for attention, which like there is not halved for
    causality. PyTorch stops the second forward at the last tensor that the backward pass needs, so `out` never runs
    again unless dropout comes after it.
    """
    policy = POLICIES[recompute]
    if policy is None:
        return 0.0
    d = model.emb_dim
    again = set(PRODUCTS) - kept_products(recompute, model) - (set() if model.drop_rate else {"out"})
    products = sum(2 * d * d * PRODUCTS[product][0] * PRODUCTS[product][1] for product in again)
    attention = 0 if keeps_attention(recompute, model) else 4 * (context or model.context_length) * d
    return float(model.n_layers * (products + attention))
