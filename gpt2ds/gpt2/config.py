"""GPT-2's sizes by name, and the counts that follow from a size. No torch: the plan and the memory formula need this in
milliseconds.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from gpt2ds.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class GPT2Config:
    """One model size. The field names are those of the configuration files that users of GPT-2 recipes already have."""

    name: str
    emb_dim: int
    """Width of the residual stream, d."""
    n_heads: int
    """Attention heads; emb_dim must be a multiple."""
    n_layers: int
    """Transformer blocks, L."""
    context_length: int = 1024
    """Most tokens that the model can see at once, T."""
    vocab_size: int = 50257
    """Entries of the token embedding, V; GPT-2's own vocabulary by default."""
    drop_rate: float = 0.0
    """Dropout probability on the embeddings, the attention weights and each block's two outputs."""
    qkv_bias: bool = False
    """Whether query, key and value projections have a bias. OpenAI's weights have one; training from scratch does not
    need it.
    """

    def problems(self) -> list[str]:
        """What is wrong with this size, a sentence each; empty when nothing is."""
        found = [
            f"model '{self.name}': {field} must be a whole number from 1 to {most:,}, not {getattr(self, field)!r}."
            for field, most in _MOST.items()
            if not _is_count(getattr(self, field), most)
        ]
        if not found and self.emb_dim % self.n_heads:
            near = [heads for heads in range(1, self.emb_dim + 1) if self.emb_dim % heads == 0]
            best = min(near, key=lambda heads: abs(heads - self.n_heads))
            found.append(
                f"model '{self.name}': emb_dim {self.emb_dim} is not a multiple of n_heads {self.n_heads}; use {best}."
            )
        if not isinstance(self.drop_rate, int | float) or not 0 <= self.drop_rate < 1:
            found.append(f"model '{self.name}': drop_rate must be from 0 to below 1, not {self.drop_rate!r}.")
        if not isinstance(self.qkv_bias, bool):
            found.append(f"model '{self.name}': qkv_bias must be true or false, not {self.qkv_bias!r}.")
        return found

    @property
    def block_parameters(self) -> int:
        """Parameters of one block: two layer norms, attention (3d² + d²) and MLP (8d²) with their biases."""
        d = self.emb_dim
        return 12 * d * d + (13 if self.qkv_bias else 10) * d

    @property
    def parameters(self) -> int:
        """All parameters, the token embedding counted once because the head is tied to it."""
        d = self.emb_dim
        return (self.vocab_size + self.context_length) * d + self.n_layers * self.block_parameters + 2 * d

    def flops_per_token(self, context: int | None = None) -> float:
        """Floating-point operations of forward and backward per token, without recompute.

        6 per weight that multiplies (all but the position table), and 12·L·d·T for the attention matrices: the count of
        the PaLM paper (arXiv 2204.02311, appendix B), which does not halve attention for causality.
        """
        length = context or self.context_length
        weights = self.parameters - self.context_length * self.emb_dim
        return 6.0 * weights + 12.0 * self.n_layers * self.emb_dim * length

    def to_dict(self) -> dict[str, Any]:
        """The size as JSON would hold it, with its parameter count for the reader."""
        return asdict(self) | {"parameters": self.parameters}


# Far beyond what is trained; a file with more is a mistake, or meant to keep us busy.
_MOST = {"emb_dim": 10**6, "n_heads": 10**6, "n_layers": 10**4, "context_length": 10**8, "vocab_size": 10**8}

MODELS: dict[str, GPT2Config] = {
    config.name: config
    for config in (
        # A size of ours for machines without a GPU: four fifths of its work is the head, so deeper would cost little
        # more.
        GPT2Config(name="gpt2_tiny", emb_dim=128, n_heads=4, n_layers=4, context_length=256),
        GPT2Config(name="gpt2_small", emb_dim=768, n_heads=12, n_layers=12),
        GPT2Config(name="gpt2_medium", emb_dim=1024, n_heads=16, n_layers=24),
        GPT2Config(name="gpt2_large", emb_dim=1280, n_heads=20, n_layers=36),
        GPT2Config(name="gpt2_xl", emb_dim=1600, n_heads=25, n_layers=48),
    )
}


def find_model(name: str, models_file: Path | None = None) -> GPT2Config:
    """The size called `name`, from the user's own file if there is one, else from the built-in table.

    Raises UserError for a name that is in neither, with the nearest that is.
    """
    known = MODELS | (read_models(models_file) if models_file else {})
    if name not in known:
        import difflib

        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(f"Unknown model '{name}': {hint}The models are {', '.join(known)}.")
    return known[name]


def read_models(path: Path) -> dict[str, GPT2Config]:
    """The sizes of a YAML or JSON file with a `models:` section, {name: {emb_dim: ..., n_heads: ..., ...}}.

    Raises UserError with everything that is wrong in the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            content = json.loads(text)
        else:
            import yaml

            content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"Cannot read the models file {path}: {error.strerror}.") from error
    except Exception as error:  # json and yaml have parse errors of their own; both say where
        raise UserError(f"The models file {path} does not parse: {' '.join(str(error).split())}") from error
    section = content.get("models") if isinstance(content, dict) else None
    if not isinstance(section, dict) or not section:
        raise UserError(f"The models file {path} needs a section 'models:' with one entry per model.")
    problems: list[str] = []
    models: dict[str, GPT2Config] = {}
    for name, entry in section.items():
        try:
            config = _one_model(str(name), entry)
        except UserError as error:
            problems.append(f"{path}: {error}")
            continue
        problems += [f"{path}: {problem}" for problem in config.problems()]
        models[config.name] = config
    if problems:
        raise UserError.from_list(problems)
    return models


def with_context(config: GPT2Config, context: int) -> GPT2Config:
    """The same model trained on windows of `context` tokens, its position table cut to that length."""
    return replace(config, context_length=context)


def _one_model(name: str, entry: Any) -> GPT2Config:
    allowed = {field.name for field in fields(GPT2Config)} - {"name"}
    if not isinstance(entry, dict):
        raise UserError(f"model '{name}' must be a mapping with the keys emb_dim, n_heads and n_layers.")
    unknown = sorted(set(map(str, entry)) - allowed)
    missing = sorted({"emb_dim", "n_heads", "n_layers"} - set(entry))
    if unknown or missing:
        parts = [f"unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}"] if unknown else []
        parts += [f"missing {', '.join(missing)}"] if missing else []
        raise UserError(f"model '{name}': {'; '.join(parts)}. The keys are {', '.join(sorted(allowed))}.")
    return GPT2Config(name=name, **entry)


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most
