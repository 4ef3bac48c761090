"""Text from a model, one token at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def sample_tokens(
    last_logits: Callable[[Tensor], Tensor],
    prompt: list[int],
    *,
    tokens: int,
    context: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
    device: torch.device | str = "cpu",
    stop_at: int | None = None,
) -> Iterator[int]:
    """Yields up to `tokens` token ids that continue `prompt`; stops after `stop_at`, if that id comes up.

    last_logits: maps ids (1, T) to logits (1, 1, V) of the next token. Under ZeRO-3 every rank must call this with the
    same arguments and `stop_at=None`, since each forward gathers weights from all ranks; the same seed gives them the
    same ids.
    temperature: 0 always takes the likeliest token. context: at most so many last tokens are looked at.
    """
    assert prompt, "a prompt has at least one token"
    # On the CPU whatever the device, so that a seed means the same text everywhere.
    random = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(tokens):
        window = torch.tensor([ids[-context:]], device=device)
        with torch.no_grad():
            logits = last_logits(window)[0, -1].float().cpu()  # (V,)
        token = _pick(logits, temperature, top_k, random)
        ids.append(token)
        yield token
        if token == stop_at:
            return


def _pick(logits: Tensor, temperature: float, top_k: int | None, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    values, candidates = torch.topk(logits, min(top_k or logits.numel(), logits.numel()))
    probabilities = torch.softmax(values / temperature, dim=0)
    return int(candidates[torch.multinomial(probabilities, 1, generator=random)])
