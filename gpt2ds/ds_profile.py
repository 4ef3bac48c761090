"""One DeepSpeed JSON read, checked and completed: what the user wrote, what DeepSpeed will make of it, and why.

It knows no model and no device, and imports neither torch nor deepspeed.
"""

import copy
import difflib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2ds.ds_defaults import BUCKET_ELEMENTS, complete
from gpt2ds.ds_keys import check_keys
from gpt2ds.ds_rules import (
    RECOMPUTE_POLICIES,
    combination_problems,
    dtype_of,
    offload_of,
    optimizer_name,
    section,
    stage_of,
)
from gpt2ds.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class DsProfile:
    """A checked profile. `raw` is the JSON as read, `settings` the same completed (what `ds_config` starts from)."""

    name: str
    path: Path
    raw: dict[str, Any]
    settings: dict[str, Any]
    description: str
    use_when: str
    risk: str
    """What may go wrong with the training itself; empty for what is proven."""
    recompute: str
    """Which of a block's activations are kept, and which computed again: a name of `gpt2.policies`."""
    loss_chunk: int | None
    """Tokens whose logits exist at the same time; None leaves it to the program."""
    compile: bool
    """Whether torch.compile translates the blocks."""
    eight_bit_states: bool
    """Whether AdamW's moments are kept in 8 bits."""
    completions: tuple[str, ...]

    @property
    def zero_stage(self) -> int:
        return stage_of(self.settings)

    @property
    def dtype(self) -> str:
        """ "fp32", "bf16" or "fp16": the weights in forward and backward."""
        return dtype_of(self.settings)

    @property
    def grad_accum_dtype(self) -> str:
        """ "fp32", "bf16" or "fp16": the type in which micro-batches are summed; always resolved."""
        return str(self.settings["data_types"]["grad_accum_dtype"])

    @property
    def master_bytes(self) -> int:
        """Bytes of each parameter in the optimizer's own weights."""
        return 2 if section(self.settings, "bf16").get("bf16_master_weights_and_grads") else 4

    @property
    def moment_bytes(self) -> float:
        """Bytes of each parameter's two moments; in 8 bits with an fp32 scale for each 256 of them."""
        return {"8bit": 2 * (1 + 4 / 256), "bf16": 4, "fp32": 8}[self.states_dtype]

    @property
    def states_dtype(self) -> str:
        """ "fp32", "bf16" or "8bit": in what AdamW's moments are kept."""
        if self.eight_bit_states:
            return "8bit"
        return "bf16" if section(self.settings, "bf16").get("bf16_optimizer_states") else "fp32"

    @property
    def compiled_operators(self) -> str | None:
        """The operators of DeepSpeed's own that are compiled at the first start, in words; None for none."""
        if "nvme" in (self.offload_optimizer, self.offload_param):
            return "DeepSpeed's CPU Adam and its NVMe reader"
        if self._optimizer_parameter("torch_adam") or self.eight_bit_states:
            return None
        return "DeepSpeed's CPU Adam" if self.offload_optimizer else "DeepSpeed's fused Adam"

    @property
    def pins_memory(self) -> bool:
        """Whether offload buffers are page-locked."""
        return any(
            section(self.settings, f"zero_optimization.offload_{what}").get("pin_memory", True)
            for what in ("optimizer", "param")
            if offload_of(self.settings, what)
        )

    @property
    def micro_batch(self) -> int | None:
        """Sequences per rank at a time; None when it is "auto" or follows from global_batch, accumulation and ranks."""
        return self._number("train_micro_batch_size_per_gpu")

    @property
    def accumulation(self) -> int | None:
        """Micro-batches per optimizer step; None when it follows from global_batch, micro_batch and ranks."""
        return self._number("gradient_accumulation_steps")

    @property
    def global_batch(self) -> int | None:
        """Sequences per optimizer step on all ranks, where the JSON fixes it."""
        return self._number("train_batch_size")

    @property
    def gradient_clipping(self) -> float:
        """The largest gradient norm; 0 for none."""
        return float(self.settings["gradient_clipping"])

    @property
    def offload_optimizer(self) -> str | None:
        """ "cpu", "nvme" or None."""
        return offload_of(self.settings, "optimizer")

    @property
    def offload_param(self) -> str | None:
        """ "cpu", "nvme" or None."""
        return offload_of(self.settings, "param")

    @property
    def reduce_bucket_elements(self) -> int:
        """The size of ZeRO's gradient bucket in elements, whatever their type."""
        return int(section(self.settings, "zero_optimization").get("reduce_bucket_size", BUCKET_ELEMENTS))

    @property
    def overlap_comm(self) -> bool:
        """Whether reduction overlaps with backward; at ZeRO-1/2 that doubles the bucket."""
        return bool(section(self.settings, "zero_optimization").get("overlap_comm", self.zero_stage == 3))

    @property
    def live_parameter_elements(self) -> int:
        """ZeRO-3: gathered parameters beyond which nothing more is fetched ahead."""
        return int(section(self.settings, "zero_optimization").get("stage3_max_live_parameters", 1e9))

    @property
    def prefetch_elements(self) -> int:
        """ZeRO-3: parameters that are fetched ahead at a time."""
        return int(section(self.settings, "zero_optimization").get("stage3_prefetch_bucket_size", 5e7))

    @property
    def reuse_distance_elements(self) -> int:
        """ZeRO-3: parameters that are needed again within so many others stay gathered."""
        return int(section(self.settings, "zero_optimization").get("stage3_max_reuse_distance", 1e9))

    @property
    def immediate_grad_update(self) -> bool:
        """ZeRO-1 in bf16 with fp32 sums: whether each gradient is added to its sum as soon as it is there."""
        return bool(section(self.settings, "bf16").get("immediate_grad_update", False))

    @property
    def sub_group_elements(self) -> int:
        """ZeRO-3: parameters that one tile of the optimizer step covers."""
        return int(section(self.settings, "zero_optimization").get("sub_group_size", 1e9))

    @property
    def optimizer(self) -> str:
        """ "AdamW" or "Adam"."""
        return optimizer_name(self.settings)

    @property
    def lr(self) -> float | None:
        """The profile's own peak learning rate; None leaves it to the program."""
        lr = self._optimizer_parameter("lr")
        return None if lr is None else float(lr)

    @property
    def betas(self) -> tuple[float, float]:
        first, second = self._optimizer_parameter("betas")
        return float(first), float(second)

    @property
    def eps(self) -> float:
        return float(self._optimizer_parameter("eps"))

    @property
    def weight_decay(self) -> float:
        return float(self._optimizer_parameter("weight_decay"))

    def ds_config(self, *, micro_batch: int, accumulation: int, ranks: int) -> dict[str, Any]:
        """The whole dict for `deepspeed.initialize(config=...)`, a new copy at each call.

        Our section "gpt2ds" stays in (DeepSpeed ignores it), so that the dict, written to a file, is a profile again.
        """
        assert min(micro_batch, accumulation, ranks) >= 1, "the plan has resolved the batch to numbers of 1 or more"
        return copy.deepcopy(self.settings) | {
            "train_batch_size": micro_batch * accumulation * ranks,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
        }

    def notes(self) -> list[str]:
        """What was added to the JSON or will not act, a sentence each, for the log."""
        return list(self.completions)

    def _number(self, key: str) -> int | None:
        value = self.settings.get(key)
        return value if isinstance(value, int) else None

    def _optimizer_parameter(self, key: str) -> Any:
        return section(self.settings, "optimizer.params").get(key)


def shipped_profiles() -> list[Path]:
    """The JSON files that come with gpt2ds: beside the package in a clone, under share/ in an installation."""
    for folder in (Path(__file__).parents[1] / "ds_configs", Path(sys.prefix) / "share" / "gpt2ds" / "ds_configs"):
        if found := sorted(folder.glob("*.json")):
            return found
    return []


def load_profile(path: Path | str) -> DsProfile:
    """Read, check and complete a profile; a bare name such as "zero2" means the shipped one where no such file exists.

    Raises UserError with every mistake of the file, a line each.
    """
    path = _located(Path(path))
    raw = _read(path)
    settings, problems = check_keys(raw)
    own, own_problems = _own_section(settings.get("gpt2ds", {}))
    problems += own_problems
    problems += combination_problems(settings, broken=[problem.partition(":")[0] for problem in problems])
    if problems:
        # Half a surrogate pair, which JSON can spell, would stop the terminal from printing the rest.
        raise UserError.from_list(
            [f"{path}: {problem}".encode(errors="backslashreplace").decode() for problem in problems]
        )
    completions = complete(settings)
    block = settings.get("activation_checkpointing")
    recompute = "none" if block is None else "host" if block.get("cpu_checkpointing") else "full"
    return DsProfile(
        name=path.stem,
        path=path,
        raw=raw,
        settings=settings,
        description=own.get("description", ""),
        use_when=own.get("use_when", ""),
        risk=own.get("risk", ""),
        recompute=own.get("recompute", recompute),
        loss_chunk=own.get("loss_chunk"),
        compile=own.get("compile", False),
        eight_bit_states=own.get("eight_bit_states", False),
        completions=tuple(completions),
    )


def _located(path: Path) -> Path:
    try:
        if path.is_file():
            return path
        folder = path.is_dir()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the DeepSpeed profile {str(path)!r} cannot be read: {reason}") from error
    shipped = {profile.stem: profile for profile in shipped_profiles()}
    bare = path.name.removesuffix(".json")
    if bare in shipped and path.parent == Path():
        return shipped[bare]
    near = difflib.get_close_matches(bare, shipped, n=1)
    fix = f"did you mean {near[0]}?" if near else "give the path of a DeepSpeed JSON"
    what = "is a folder" if folder else "does not exist"
    raise UserError(f"the DeepSpeed profile {path} {what}: {fix} (shipped profiles: {', '.join(shipped) or 'none'})")


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in items)
        repeated.extend(sorted(name for name, count in counts.items() if count > 1))
        return dict(items)

    def constant(name: str) -> None:
        raise UserError(f"{path}: {name} is not JSON: write a number")

    try:
        data = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: {_syntax(text, error)}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not a DeepSpeed JSON: {error}") from error
    if repeated:
        raise UserError.from_list(
            [f"{path}: the key {json.dumps(name)} stands twice in one section" for name in repeated]
        )
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold one JSON object in braces, not {_KINDS[type(data)]}")
    return data


_KINDS = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}


def _syntax(text: str, error: json.JSONDecodeError) -> str:
    lines = text.splitlines() or [""]
    line = lines[error.lineno - 1] if error.lineno <= len(lines) else ""
    before = text[: error.pos].rstrip()
    hint = ""
    if before.endswith(",") and text[error.pos : error.pos + 1] in ("}", "]", '"', "") and "delimiter" not in error.msg:
        hint = ": the comma before it is one too many"
    elif text[error.pos : error.pos + 1] in ("/", "#"):
        hint = ': JSON has no comments, "gpt2ds": {"description": ...} takes words'
    elif text[error.pos : error.pos + 1] == "'":
        hint = ": JSON takes double quotes only"
    elif text[error.pos : error.pos + 4] in ("True", "Fals", "None"):
        hint = ": write true, false or null in lower case"
    elif "Expecting ',' delimiter" in error.msg:
        hint = ": a comma is missing before it"
    return (
        f"is not JSON at line {error.lineno}, column {error.colno}{hint or ': ' + error.msg}\n    {line.strip()[:120]}"
    )


def _own_section(given: Any) -> tuple[dict[str, Any], list[str]]:
    """Our section of the JSON, checked by pydantic; imported here because pydantic costs more than all the rest."""
    if given == {}:
        return {}, []
    from typing import Literal

    from pydantic import BaseModel, ConfigDict, Field, ValidationError

    class Own(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        description: str = ""
        use_when: str = ""
        risk: str = ""
        recompute: Literal[RECOMPUTE_POLICIES] = "none"  # type: ignore[valid-type]
        loss_chunk: int | None = Field(None, ge=1)
        compile: bool = False
        eight_bit_states: bool = False

    try:
        return Own.model_validate(given).model_dump(exclude_unset=True), []
    except ValidationError as error:
        return {}, [_own_problem(item, list(Own.model_fields)) for item in error.errors()]


def _own_problem(item: Any, keys: list[str]) -> str:
    path = ".".join(["gpt2ds", *(str(part) for part in item["loc"])])
    if path == "gpt2ds":
        return f"{path}: must be a section in braces"
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), keys, n=1)
        return f"{path}: no such key: " + (f"did you mean {near[0]}?" if near else f"it takes {', '.join(keys)}")
    if item["loc"] == ("loss_chunk",):
        return f"{path}: must be a number of tokens, 1 or more"
    return f"{path}: {item['msg'][0].lower()}{item['msg'][1:]}"
