"""Validation loss on a fixed set of windows, and a sample of text."""

import numpy as np
import torch

from gpt2ds.corpus.batches import Windows, fixed_windows
from gpt2ds.corpus.tokenizer import load_tokenizer
from gpt2ds.gpt2.generate import sample_tokens
from gpt2ds.training.engine import TrainingEngine, gather_numbers


class Evaluation:
    """The validation windows of a run; the same at every evaluation and at any number of ranks."""

    def __init__(self, windows: Windows, *, count: int, micro_batch: int) -> None:
        """count: windows looked at; micro_batch: windows per forward pass."""
        self.windows = windows
        self.chosen: np.ndarray = fixed_windows(windows, count)
        self.micro_batch = micro_batch

    def loss(self, engine: TrainingEngine) -> float:
        """Mean loss per token in nats over all chosen windows, the same number on every rank."""
        ranks = engine.ranks
        parts = [self.chosen[i : i + self.micro_batch] for i in range(0, len(self.chosen), self.micro_batch)]
        rounds = -(-len(parts) // ranks.world_size)
        total = torch.zeros((), dtype=torch.float64)
        with engine.evaluating():
            for round_ in range(rounds):
                index = round_ * ranks.world_size + ranks.rank
                # Every rank runs every round: under ZeRO-3 a forward pass is a collective. The extra ones count
                # nothing.
                part = parts[min(index, len(parts) - 1)]
                ids, targets = to_device(self.windows[part], ranks.device)
                loss = engine.loss_of(ids, targets)
                if index < len(parts):
                    total += loss.double().cpu() * len(part)
        return sum(row[0] for row in gather_numbers([float(total)], ranks.device)) / len(self.chosen)


def to_device(window: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (B, T + 1) → ids and targets, each (B, T), on the device; the targets are the ids one token later."""
    tokens = torch.from_numpy(window)
    if device.type == "cuda":
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    return tokens[:, :-1], tokens[:, 1:]


def sample_text(engine: TrainingEngine, prompt: str, *, tokens: int, seed: int) -> str:
    """The prompt's continuation by the model as it is; called by all ranks alike."""
    tokenizer = load_tokenizer()
    with engine.evaluating():
        continued = list(
            sample_tokens(
                engine.last_logits,
                tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token],
                tokens=tokens,
                context=engine.plan.context,
                seed=seed,
                device=engine.ranks.device,
            )
        )
    return tokenizer.decode(continued)
