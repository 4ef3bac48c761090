"""What a finished or running run's weights say: generated text and the validation loss, without DeepSpeed."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2ds.corpus.batches import Windows, fixed_windows
from gpt2ds.corpus.shards import check_ids, open_corpus
from gpt2ds.corpus.tokenizer import load_tokenizer
from gpt2ds.errors import UserError
from gpt2ds.gpt2.generate import sample_tokens
from gpt2ds.gpt2.model import GPT2
from gpt2ds.gpt2.weights import load_model
from gpt2ds.training.checkpoints import Position, newest_weights
from gpt2ds.training.evaluation import to_device


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationResult:
    """Mean loss per token in nats over the windows looked at."""

    loss: float
    step: int
    windows: int
    tokens: int
    folder: Path

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def continue_text(
    run: Path, prompt: str, *, tokens: int, temperature: float, top_k: int | None, seed: int
) -> Iterator[str]:
    """Yields the prompt's continuation piece by piece, ending where the model ends the document.

    Raises UserError for values that make no sense and for a run without a checkpoint.
    """
    if tokens < 1 or temperature < 0 or (top_k is not None and top_k < 1):
        raise UserError("--tokens must be at least 1, --temperature and --top-k must not be negative.")
    model, _ = _load(run)
    device = next(model.parameters()).device
    tokenizer = load_tokenizer()
    pending = b""
    for token in sample_tokens(
        lambda ids: model(ids, last_only=True),
        tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token],
        tokens=tokens,
        context=model.config.context_length,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        device=device,
        stop_at=tokenizer.eot_token,
    ):
        if token == tokenizer.eot_token:
            break
        # A character of several bytes may be spread over tokens: what is not yet whole waits for the next one.
        pending += tokenizer.decode_single_token_bytes(token)
        text = pending.decode("utf-8", errors="ignore")
        if len(text.encode()) == len(pending) or len(pending) > 8:
            yield pending.decode("utf-8", errors="replace")
            pending = b""
    if pending:
        yield pending.decode("utf-8", errors="replace")


def validation_loss(run: Path, data: Path | None, *, windows: int | None, micro_batch: int) -> ValidationResult:
    """The newest checkpoint's loss over a corpus' validation windows, all of them when `windows` is None.

    Raises UserError when run or data are not there, or do not belong together.
    """
    if micro_batch < 1 or (windows is not None and windows < 1):
        raise UserError("--micro-batch and --windows must be at least 1.")
    model, position = _load(run)
    folder = data or Path(json.loads((run / "plan.json").read_text(encoding="utf-8"))["data"]["folder"])
    corpus = open_corpus(folder)
    check_ids(corpus, model.config.vocab_size)
    source = Windows(corpus.val, model.config.context_length)
    chosen = fixed_windows(source, windows or len(source))
    device = next(model.parameters()).device
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(chosen), micro_batch):
            part = chosen[start : start + micro_batch]
            total += float(model(*to_device(source[part], device))) * len(part)
    return ValidationResult(
        loss=total / len(chosen),
        step=position.step,
        windows=len(chosen),
        tokens=len(chosen) * model.config.context_length,
        folder=folder,
    )


def _load(run: Path) -> tuple[GPT2, Position]:
    if not (run / "plan.json").is_file():
        raise UserError(f"{run} is not a run folder (no plan.json): give the path of one, or its name below logs/.")
    passed_over: list[str] = []
    path, position = newest_weights(run, passed_over.append)
    model = load_model(path)
    if not torch.cuda.is_available():
        return model, position
    return model.cuda(), position
