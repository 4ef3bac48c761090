"""GPT-2 as a torch module: pre-norm blocks, learned positions, a head tied to the token embedding.

Shapes: B sequences, T tokens, d = emb_dim, H heads, D = d / H, V = vocab_size. Submodules bear the names of OpenAI's
checkpoint, so that a weight is called the same here and there.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.gpt2.loss import chunked_cross_entropy
from gpt2ds.gpt2.recompute import Recompute

LAYER_NORM_EPSILON = 1e-5

# GPT-2's initial standard deviations (OpenAI's gpt-2 source, src/model.py: wte, wpe, conv1d); the outputs that are
# added to the residual stream are scaled down by sqrt(2L) (GPT-2 report, section 2.3): its variance must not grow with
# depth.
TOKEN_STD = 0.02
POSITION_STD = 0.01
LINEAR_STD = 0.02


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        d = config.emb_dim
        self.c_attn = nn.Linear(d, 3 * d, bias=config.qkv_bias)
        self.c_proj = nn.Linear(d, d)
        self.n_heads = config.n_heads
        self.drop_rate = config.drop_rate

    def forward(self, x: Tensor) -> Tensor:
        B, T, d = x.shape
        q, k, v = (
            part.view(B, T, self.n_heads, d // self.n_heads).transpose(1, 2)  # (B, H, T, D)
            for part in rowwise(self.c_attn, x).chunk(3, dim=2)
        )
        drop_rate = self.drop_rate if self.training else 0.0
        # Picks the flash kernel where device and dtype have one; the T x T matrix then never exists.
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop_rate, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(B, T, d)
        out: Tensor = F.dropout(rowwise(self.c_proj, y), self.drop_rate, self.training)
        return out


class MLP(nn.Module):
    """The position-wise feed-forward layer, four times as wide inside."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.emb_dim, 4 * config.emb_dim)
        self.c_proj = nn.Linear(4 * config.emb_dim, config.emb_dim)
        self.drop_rate = config.drop_rate

    def forward(self, x: Tensor) -> Tensor:
        y = rowwise(self.c_proj, F.gelu(rowwise(self.c_fc, x), approximate="tanh"))  # (B, T, d)
        return F.dropout(y, self.drop_rate, self.training)


def rowwise(linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(x) as one product of two matrices, (B·T, d) with the weight.

    Under ZeRO-3 DeepSpeed's own linear adds the bias to a three-dimensional product in place (runtime/zero/linear.py),
    and a product that a recompute policy keeps must not change after it was kept.
    """
    out: Tensor = linear(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return out


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to the residual stream after."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.emb_dim, eps=LAYER_NORM_EPSILON)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.emb_dim, eps=LAYER_NORM_EPSILON)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT2(nn.Module):
    """The whole model. Called with targets it returns the mean loss; without, the logits."""

    def __init__(self, config: GPT2Config, *, recompute: str = "none", loss_chunk: int = 1024) -> None:
        """Builds and initialises the model in the default dtype, from torch's global random state.

        recompute: activation checkpointing policy of every block, one of `policies.POLICIES`.
        loss_chunk: tokens whose logits exist at the same time when the loss is computed.
        """
        super().__init__()
        self.config = config
        self.recompute = Recompute(recompute, config)
        self.loss_chunk = loss_chunk
        self.wte = nn.Embedding(config.vocab_size, config.emb_dim)
        self.wpe = nn.Embedding(config.context_length, config.emb_dim)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.emb_dim, eps=LAYER_NORM_EPSILON)
        for name, module in self.named_modules():
            module.is_residual_output = name.endswith("c_proj")
        # `apply`, not a walk over parameters(): under DeepSpeed's zero.Init parameters are empty outside `apply`, and a
        # walk would initialise nothing without a word.
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            shrink = math.sqrt(2 * self.config.n_layers) if module.is_residual_output else 1.0
            nn.init.normal_(module.weight, std=LINEAR_STD / shrink)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=TOKEN_STD if module is self.wte else POSITION_STD)

    def hidden(self, ids: Tensor) -> Tensor:
        """The normalised last hidden states (B, T, d) of token ids (B, T); T at most context_length."""
        _, T = ids.shape
        assert self.config.context_length >= T, (T, self.config.context_length)
        x = self.wte(ids) + self.wpe(torch.arange(T, device=ids.device))  # (B, T, d)
        x = F.dropout(x, self.config.drop_rate, self.training)
        for block in self.h:
            x = self.recompute(block, x) if torch.is_grad_enabled() else block(x)
        out: Tensor = self.ln_f(x)
        return out

    def forward(self, ids: Tensor, targets: Tensor | None = None, *, last_only: bool = False) -> Tensor:
        """ids and targets (B, T) → mean cross-entropy in nats (scalar, fp32); without targets → logits (B, T, V).

        last_only: only the logits of the last position, (B, 1, V), for generation.
        """
        hidden = self.hidden(ids)
        if targets is not None:
            return chunked_cross_entropy(hidden.flatten(0, 1), self.wte.weight, targets.flatten(), self.loss_chunk)
        # In `forward` and not in a method of its own: only here does ZeRO-3 gather a weight that another module owns.
        return F.linear(hidden[:, -1:] if last_only else hidden, self.wte.weight)
