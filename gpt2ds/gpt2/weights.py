"""Weights on disk: our own safetensors file, which needs nothing else to be loaded, and Hugging Face's GPT-2 names."""

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from gpt2ds.errors import UserError
from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.gpt2.model import GPT2

# Hugging Face's GPT-2 keeps OpenAI's Conv1D layout: these weights are stored (in, out), a torch Linear has (out, in).
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def save_weights(path: Path, config: GPT2Config, state: Mapping[str, Tensor]) -> None:
    """Writes the weights, and the size they belong to in the file's own header, so that `load_model` needs no other
    file.

    Written under another name first: a reader never sees half a file.
    """
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".part")
    save_file(
        {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()},
        temporary,
        metadata=weights_metadata(config),
    )
    os.replace(temporary, path)


def weights_metadata(config: GPT2Config) -> dict[str, str]:
    """What a weights file's header says of the model that it belongs to."""
    described = {key: value for key, value in config.to_dict().items() if key != "parameters"}
    return {"format": "pt", "gpt2ds": json.dumps(described)}


def load_model(path: Path, *, dtype: torch.dtype | None = None) -> GPT2:
    """The model of a weights file of ours, in evaluation mode, on the CPU; dtype None keeps the file's.

    Raises UserError when the file is not one of ours or is damaged. Nothing in the file is executed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("gpt2ds")
            if header is None:
                raise UserError(f"{path} is not a weights file of gpt2ds: its header does not name the model.")
            known = {field.name for field in fields(GPT2Config)}
            config = GPT2Config(**{key: value for key, value in json.loads(header).items() if key in known})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"Cannot read the weights {path}: {_first_line(error)}") from error
    if "transformer.wte.weight" in state:  # written by `gpt2ds export`
        state = from_hugging_face(state)
        if not config.qkv_bias:
            # Zeros that the export added; others stay, and are reported below.
            state = {name: x for name, x in state.items() if not name.endswith("attn.c_attn.bias") or x.any()}
    _check_size(path, config, state)
    with torch.device("meta"):
        model = GPT2(config)
    expected = set(model.state_dict())
    if set(state) != expected:
        odd = sorted(set(state) ^ expected)
        raise UserError(f"{path} does not hold the tensors of a {config.name}: {', '.join(odd[:3])} differ.")
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path} holds tensors of other shapes than a {config.name} has.") from error
    return model.eval()


def _check_size(path: Path, config: GPT2Config, state: Mapping[str, Tensor]) -> None:
    """UserError unless the header's size is that of the tensors: a stranger's header must not make us build more."""
    if problems := config.problems():
        raise UserError(f"The header of {path} is damaged: {problems[0]}")
    of_header = (
        (config.vocab_size, config.emb_dim),
        (config.context_length, config.emb_dim),
        config.n_layers,
    )
    of_tensors = (
        *(tuple(state[name].shape) if name in state else None for name in ("wte.weight", "wpe.weight")),
        sum(name.endswith(".ln_1.weight") for name in state),
    )
    if of_header != of_tensors:
        raise UserError(
            f"{path} does not hold the tensors of a {config.name}: token and position embedding and the number of "
            f"layers should be {of_header}, not {of_tensors}."
        )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the names and in the layout of transformers' GPT2LMHeadModel.

    Without a query, key and value bias a zero one is added, because theirs always has it.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        out[f"transformer.{name}"] = tensor.t().contiguous() if name.endswith(_TRANSPOSED) else tensor
        bias = name.removesuffix("weight") + "bias"
        if name.endswith("attn.c_attn.weight") and bias not in state:
            out[f"transformer.{bias}"] = tensor.new_zeros(tensor.shape[0])
    out["lm_head.weight"] = state["wte.weight"]
    return out


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse: a state dict of transformers' GPT2LMHeadModel (or of OpenAI's weights in that form) under our
    names.
    """
    out: dict[str, Tensor] = {}
    for full_name, tensor in state.items():
        name = full_name.removeprefix("transformer.")
        # The causal mask, which old files store as a buffer, and the head, which is the token embedding.
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue
        out[name] = tensor.t().contiguous() if name.endswith(_TRANSPOSED) else tensor
    return out
