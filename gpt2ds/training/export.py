"""A run's weights as a folder that Hugging Face's transformers opens without a network, with tokenizer and model card.

Reads safetensors and JSON only; nothing is unpickled, so a run folder from a stranger can be exported.
"""

import glob
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt2ds.corpus.tokenizer import END_OF_TEXT_ID, VOCAB_SIZE
from gpt2ds.corpus.tokenizer_files import write_tokenizer_files
from gpt2ds.errors import UserError
from gpt2ds.files import sync_folder
from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.gpt2.model import LAYER_NORM_EPSILON, TOKEN_STD
from gpt2ds.gpt2.model_card import model_card
from gpt2ds.gpt2.weights import load_model, save_weights, to_hugging_face
from gpt2ds.processes import start_ticks
from gpt2ds.runlog.metrics import METRICS_FILE, History, read_records
from gpt2ds.training.inference import chosen_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written."""

    folder: Path
    model: GPT2Config
    dtype: str
    step: int | None
    """None when the weights came without a run."""
    size_bytes: int


def export(run: Path, out: Path, *, checkpoint: str, dtype: str | None, tell: Callable[[str], None]) -> Exported:
    """Writes the folder `out`, whole or not at all.

    run: a run folder, or what `export` wrote, or a weights file. checkpoint: `newest`, `best` or a name.
    dtype: fp32, bf16, fp16; None keeps the checkpoint's. tell: told of what is passed over or unknown.
    Raises UserError for whatever is wrong with these, and when `out` cannot be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: it is one of {', '.join(DTYPES)}.")
    asked, out = out, Path(os.path.abspath(out))
    _check_free(out)
    path, position = chosen_weights(run, checkpoint, tell)
    model = load_model(path)
    config, state = model.config, model.state_dict()
    if config.vocab_size < VOCAB_SIZE:
        raise UserError(
            f"{path} is of a vocabulary of {config.vocab_size}, smaller than GPT-2's {VOCAB_SIZE}: the tokenizer does "
            "not belong to it, so it cannot be exported."
        )
    if dtype is not None:
        state = {name: tensor.to(DTYPES[dtype]) for name, tensor in state.items()}
    if odd := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        fix = "a number does not fit into fp16: take --dtype bf16" if dtype == "fp16" else "take another --checkpoint"
        raise UserError(f"{odd[0]} of {path} would hold numbers that are not finite: {fix}.")
    stored = state["wte.weight"].dtype
    tensors = to_hugging_face(state)
    # The head is the token embedding: transformers ties them again, and safetensors refuses the same bytes twice.
    del tensors["lm_head.weight"]
    plan, history = _known(run, tell) if position else ({}, None)
    card = model_card(config, dtype=NAMES.get(stored, str(stored)), plan=plan, history=history, position=position)

    temporary = out.with_name(f".{out.name}.{os.getpid()}.writing")
    try:
        _remove_half_written(out)
        temporary.mkdir(parents=True)
        save_weights(temporary / "model.safetensors", config, tensors)
        write_tokenizer_files(temporary, config.context_length)
        _write_json(temporary / "config.json", _config(config, stored))
        _write_json(temporary / "generation_config.json", _generation_config())
        # Weights are written for their owner alone; what is exported is meant for others as well.
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")
        (temporary / "README.md").write_text(card, encoding="utf-8", errors="replace")
        for file in temporary.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        size = sum(file.stat().st_size for file in temporary.iterdir())
        temporary.rename(out)  # onto nothing, or an empty folder
        sync_folder(out.parent)
    except OSError as error:
        raise UserError(f"Cannot write {out} ({error.strerror or error}): choose another --out.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(
        folder=asked,
        model=config,
        dtype=NAMES.get(stored, str(stored)),
        step=position.step if position else None,
        size_bytes=size,
    )


def _check_free(out: Path) -> None:
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise UserError(f"Cannot look into {out} ({error.strerror}): choose another --out.") from error
    if taken:
        what = "a folder that holds something" if out.is_dir() else "a file"
        raise UserError(f"{out} is {what} already: choose another --out, or remove it first.")


def _remove_half_written(out: Path) -> None:
    """What an export that was killed has left here."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.writing"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and start_ticks(int(pid)) is None:
            shutil.rmtree(left, ignore_errors=True)


def _known(run: Path, tell: Callable[[str], None]) -> tuple[dict[str, Any], History | None]:
    """What plan.json and metrics.jsonl say, for the card alone: weights are not given up for a damaged log."""
    plan: dict[str, Any] = {}
    history = None
    try:
        content = json.loads((run / "plan.json").read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
        plan = {name: section for name, section in content.items() if isinstance(section, dict)}
    except (OSError, ValueError, RecursionError) as error:
        tell(f"{run / 'plan.json'} cannot be read ({error}): the model card says less.")
    try:
        history = History.of(read_records(run / METRICS_FILE))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        tell(f"{run / METRICS_FILE} cannot be read ({error}): the model card says less.")
    return plan, history


def _config(config: GPT2Config, dtype: torch.dtype) -> dict[str, Any]:
    """transformers' GPT2Config of the same model."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.emb_dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "attn_pdrop": config.drop_rate,
        "embd_pdrop": config.drop_rate,
        "resid_pdrop": config.drop_rate,
        "initializer_range": TOKEN_STD,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def _generation_config() -> dict[str, Any]:
    """What `gpt2ds generate` does by default."""
    ids = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID, "pad_token_id": END_OF_TEXT_ID}
    return ids | {"do_sample": True, "temperature": 0.8, "top_k": 50, "max_new_tokens": 100}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
