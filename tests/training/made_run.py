"""A run folder with complete checkpoints, written by the rooms that write a real one but without training: in 0.1 s."""

import json
import os
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import torch

from gpt2ds.files import file_sha256
from gpt2ds.gpt2.model import GPT2
from gpt2ds.gpt2.weights import save_weights
from gpt2ds.options import TrainOptions
from gpt2ds.planning import resolve
from gpt2ds.runlog.metrics import RunLog
from gpt2ds.training.manifest import WEIGHTS, Manifest, Position, checkpoint_name

STEPS = (2, 4)
LOSSES = {2: 10.25, 4: 10.5}


def make_run(logs: Path, models_file: Path, corpus_folder: Path, name: str = "a") -> Path:
    """A run of the model `small`: checkpoints at the steps 2 and 4, of which the first has the better loss."""
    options = TrainOptions(
        ds="fp32_baseline",
        model="small",
        models_file=models_file,
        data=corpus_folder,
        micro_batch=2,
        accumulation=1,
        steps=8,
        keep=2,
        name=name,
        out=logs,
    )
    plan = resolve(options, ranks=1)
    run = plan.folder
    with RunLog(run) as log:
        log.record("start", 0, command="gpt2ds train", versions={}, hardware={}, total_steps=8)
        for step in STEPS:
            log.record("step", step, loss=10.4, lr=1e-3, grad_norm=1.0, tokens=step * plan.tokens_per_step)
            log.record("evaluation", step, val_loss=LOSSES[step], windows=4, seconds=0.1)
            log.record("sample", step, prompt="Fruits", text=f"Fruits of step {step}")
            log.record("checkpoint", step, name=checkpoint_name(step), bytes=1, seconds=0.1)
    write_json(run / "plan.json", plan.to_dict())
    write_json(run / "ds_config.json", plan.ds_config())
    for step in STEPS:
        folder = run / "checkpoints" / checkpoint_name(step)
        folder.mkdir(parents=True)
        torch.manual_seed(step)
        save_weights(folder / WEIGHTS, plan.model, GPT2(plan.model).state_dict())
        size = os.stat(folder / WEIGHTS).st_size
        position = filled(
            Position, step=step, sequences_seen=step * plan.global_batch, elapsed_seconds=1.5, val_loss=LOSSES[step]
        )
        filled(
            Manifest,
            position=position,
            adam_steps=step,
            ranks=1,
            identity=plan.identity(),
            files={WEIGHTS: {"bytes": size, "sha256": file_sha256(folder / WEIGHTS)}},
        ).write(folder)
    return run


def filled(kind: type[Any], **known: Any) -> Any:
    """A dataclass with the given fields, all others empty: it should not matter here what else a position holds."""
    empty = {name: None if NoneType in get_args(hint) else (get_origin(hint) or hint)() for name, hint in hints(kind)}
    return kind(**empty | known)


def hints(kind: type[Any]) -> list[tuple[str, Any]]:
    """Fields and types, those aside that cannot be made empty."""
    return [(name, hint) for name, hint in get_type_hints(kind).items() if hint is not Position]


def write_json(path: Path, content: object) -> None:
    """As a run writes them."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
