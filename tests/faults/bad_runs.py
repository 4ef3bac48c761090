"""Run folders that are damaged or made by a stranger: manifests, headers of weights files, plan.json."""

import json
import math
from typing import Any

from faults.bad_input import REMOVED
from faults.bad_profiles import TEXTS

THROUGH = {
    "generate": ["generate", "run", "Fruits", "--tokens", "2"],
    "evaluate": ["evaluate", "run", "--windows", "2"],
    "export": ["export", "run", "--out", "hf"],
}

OF_MANIFEST = ["format", "position", "files", "position.step", "position.sequences_seen", "files.model~safetensors"]
OF_MANIFEST += ["position.elapsed_seconds", "position.skipped_steps", "files.model~safetensors.bytes"]
OF_MANIFEST += ["files.model~safetensors.sha256"]


def rewritten(weights: bytes, **changes: Any) -> bytes:
    """A weights file whose header says something else of the model, or whose first tensor lies elsewhere."""
    size = int.from_bytes(weights[:8], "little")
    head = json.loads(weights[8 : 8 + size])
    model = json.loads(head["__metadata__"]["gpt2ds"])
    first = next(name for name in head if name != "__metadata__")
    for name, value in changes.items():
        if name in ("shape", "data_offsets", "dtype"):
            head[first][name] = value
        else:
            model[name] = value
    head["__metadata__"]["gpt2ds"] = changes.get("metadata", json.dumps(model))
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + weights[8 + size :]


HEADERS: dict[str, dict[str, Any]] = {
    "more layers": {"n_layers": 3},
    "no end of layers": {"n_layers": 10**12},
    "huge": {"emb_dim": 10**15, "vocab_size": 10**15},
    "wider": {"emb_dim": 64},
    "odd heads": {"n_heads": 5},
    "no heads": {"n_heads": 0},
    "heads of text": {"n_heads": "two"},
    "layers of lists": {"n_layers": [2]},
    "negative": {"context_length": -32},
    "a bias that is not there": {"qkv_bias": True},
    "a bias of text": {"qkv_bias": "no"},
    "dropout": {"drop_rate": 7},
    "dropout nan": {"drop_rate": math.nan},
    "no object": {"metadata": "[1, 2]"},
    "a number": {"metadata": "3"},
    "no JSON": {"metadata": "{"},
    "deep": {"metadata": "[" * 20_000},
    "another shape": {"shape": [32]},
    "beyond the file": {"data_offsets": [0, 10**12]},
    "backwards": {"data_offsets": [128, 0]},
    "another type": {"dtype": "I8"},
    "no type": {"dtype": "X9"},
}
DAMAGES: dict[str, Any] = {
    name: lambda w, changes=changes: rewritten(w, **changes) for name, changes in HEADERS.items()
}
DAMAGES |= {
    "weights empty": lambda w: b"",
    "weights cut": lambda w: w[: len(w) // 2],
    "weights zeros": lambda w: bytes(1000),
    "a header without end": lambda w: (2**62).to_bytes(8, "little") + w[8:],
    "weights are text": lambda w: b"words " * 500,
    "weights are a pickle": lambda w: (
        b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
    ),
    "weights of a zip": lambda w: b"PK\x03\x04" + bytes(500),
}


def is_object(content: bytes) -> bool:
    """Whether it is some JSON object, which is all that the training log asks of ds_config.json."""
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False


NO_PLANS = TEXTS
NO_OBJECTS = {name: content for name, content in TEXTS.items() if not is_object(content)}
RESUME = ["train", "--resume", "--out", ".", "--name", "run"]


PLAN_CHANGES: list[tuple[list[str], str, Any]] = [
    *((["report", "run"], at, value) for at in ("model", "batch") for value in (REMOVED, None, [], "x", 7)),
    *((["evaluate", "run"], "data", value) for value in (REMOVED, None, [], 7, "nowhere")),
    *((["evaluate", "run"], "data.folder", value) for value in (REMOVED, None, [], 7, "nowhere")),
    *((RESUME, "options", value) for value in (REMOVED, None, [], "x", 7)),
    *((RESUME, "identity", value) for value in (REMOVED, None, [], {}, "x", 7)),
    *((RESUME, f"identity.{at}", value) for at in ("data", "seed", "model n_layers") for value in (REMOVED, [], "x")),
    *((RESUME, "options.steps", value) for value in ("many", [], {}, -1, 0, 1.5, "1e9", 10**400)),
    *((RESUME, "options.ds", value) for value in (7, [], {}, "", "zero9", "../nowhere.json")),
    *((RESUME, "options.data", value) for value in (7, [], {}, "", "nowhere", "../..")),
    *((RESUME, "options.model", value) for value in (7, [], {}, "gpt2_smal")),
    *((RESUME, "options.models_file", value) for value in (7, [], {}, "nowhere.yaml")),
    *((RESUME, "options.lr", value) for value in ("fast", [], {}, -1, math.nan)),
    *((RESUME, "options.schedule", value) for value in (7, [], {}, "cosin")),
    *((RESUME, "options.keep", value) for value in ("many", [], {}, -1, 0)),
    *((RESUME, "options.seed", value) for value in ("seven", [], {}, 1.5)),
]  # fmt: skip
