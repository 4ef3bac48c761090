"""What the weights of a run, or exported ones, say: generated text and the validation loss, without DeepSpeed."""

import json
import math
from collections.abc import Callable, Iterator
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
from gpt2ds.training.evaluation import to_device
from gpt2ds.training.manifest import WEIGHTS, Position, best_name, newest_weights, verify


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationResult:
    """Mean loss per token in nats over the windows looked at."""

    loss: float
    windows: int
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def load_run(run: Path, tell: Callable[[str], None]) -> tuple[GPT2, Position | None]:
    """The model of a run's newest checkpoint whose weights hold, on the GPU if there is one, and where it stood.

    run: a run folder; or what `gpt2ds export` wrote, or a weights file of ours alone, which stand nowhere in a run.
    tell: told of newer checkpoints that are passed over. Raises UserError when there are no weights.
    """
    path, position = chosen_weights(run, "newest", tell)
    model = load_model(path)
    return (model.cuda() if torch.cuda.is_available() else model), position


def chosen_weights(run: Path, checkpoint: str, tell: Callable[[str], None]) -> tuple[Path, Position | None]:
    """The weights file of a run's checkpoint, and where it stood; of an exported folder or a lone file, None.

    checkpoint: `newest`, `best` (by validation loss) or the name of one. Raises UserError when there is none such.
    """
    if not (run / "plan.json").is_file():
        path = run if run.is_file() else run / WEIGHTS
        if not path.is_file():
            raise UserError(
                f"{run} is not a run folder (no plan.json), an exported folder (no {WEIGHTS}) or a weights file: give "
                "the path of one, or a run's name below logs/."
            )
        if checkpoint != "newest":
            raise UserError(f"{run} is no run folder, so it has no checkpoint '{checkpoint}': leave --checkpoint out.")
        return path, None
    if checkpoint == "newest":
        return newest_weights(run, tell)
    folder = run / "checkpoints"
    # Names come from the folder alone: what is asked for is only compared with them, so it leads nowhere else.
    names = sorted(path.name for path in folder.glob("step-*") if path.is_dir())
    if checkpoint == "best" and (checkpoint := best_name(folder.glob("step-*")) or "") not in names:
        raise UserError(
            f"No checkpoint of {run} was saved at a step with a validation loss, so none is known to be the best: "
            "leave --checkpoint out for the newest."
        )
    if checkpoint not in names:
        raise UserError(f"{run} has no checkpoint '{checkpoint}': it is newest, best or one of {', '.join(names)}.")
    try:
        manifest = verify(folder / checkpoint, WEIGHTS)
    except ValueError as damage:
        raise UserError(f"Checkpoint {checkpoint} of {run} cannot be used: {damage}. Take the newest.") from damage
    return folder / checkpoint / WEIGHTS, manifest.position


def continue_text(
    model: GPT2, prompt: str, *, tokens: int, temperature: float, top_k: int | None, seed: int
) -> Iterator[str]:
    """Yields the prompt's continuation piece by piece, ending where the model ends the document.

    Raises UserError for values that make no sense.
    """
    if tokens < 1 or not 0 <= temperature < math.inf or (top_k is not None and top_k < 1):
        raise UserError("--tokens must be at least 1, --temperature 0 or more and finite, --top-k not negative.")
    if not abs(seed) < 2**63:
        raise UserError("--seed must be a number of at most 63 bits.")
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
        device=model.wte.weight.device,
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


def validation_folder(run: Path) -> Path:
    """The corpus that a run was trained on; UserError when its plan cannot be read."""
    try:
        return Path(json.loads((run / "plan.json").read_text(encoding="utf-8"))["data"]["folder"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{run / 'plan.json'} does not say what the run was trained on: give --data.") from error


def validation_loss(model: GPT2, data: Path, *, windows: int | None, micro_batch: int) -> ValidationResult:
    """The model's loss over a corpus' validation windows, all of them when `windows` is None.

    Raises UserError when the corpus is not there, or of another vocabulary.
    """
    if micro_batch < 1 or (windows is not None and windows < 1):
        raise UserError("--micro-batch and --windows must be at least 1.")
    corpus = open_corpus(data)
    check_ids(corpus, model.config.vocab_size)
    source = Windows(corpus.val, model.config.context_length)
    chosen = fixed_windows(source, windows or len(source))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(chosen), micro_batch):
            part = chosen[start : start + micro_batch]
            total += float(model(*to_device(source[part], model.wte.weight.device))) * len(part)
    return ValidationResult(
        loss=total / len(chosen), windows=len(chosen), tokens=len(chosen) * model.config.context_length
    )
