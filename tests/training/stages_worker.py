"""One of two ranks: trains the small model at every ZeRO stage in fp32 and bf16, and puts a NaN into one rank's data
path.

Prints a JSON object of results on rank 0. Arguments: folder of profiles, models file, corpus.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rank_steps import POISONS, batches_of, poison, position_at, weights_of
from safetensors.torch import load_file

from gpt2ds.corpus.batches import Windows
from gpt2ds.gpt2.model import GPT2
from gpt2ds.options import TrainOptions
from gpt2ds.plan import Plan
from gpt2ds.planning import resolve
from gpt2ds.training import checkpoints, restoring
from gpt2ds.training.engine import Ranks, TrainingEngine, parameter_groups, start_ranks, stop_ranks
from gpt2ds.training.evaluation import Evaluation, sample_text, to_device

LR = 1e-3
STEPS = 3


def one_step(engine: TrainingEngine, plan: Plan, step: int) -> tuple[float, float, bool]:
    batches = batches_of(plan, engine.ranks.rank, engine.ranks.world_size, plan.micro_batch)
    loss = 0.0
    for number, window in enumerate(batches.micro_batches(step * plan.global_batch)):
        if number:
            engine.end_micro_step()
        loss += float(engine.micro_step(*to_device(window, engine.ranks.device)))
    norm, taken = engine.optimizer_step(LR)
    return loss / plan.accumulation, norm, taken


def plain_torch(plan: Plan) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training without DeepSpeed: whole global batch, torch's AdamW, clipping at 1.0."""
    torch.manual_seed(plan.options.get("seed"))
    model = GPT2(plan.model)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, plan.profile.weight_decay), lr=LR, betas=plan.profile.betas, eps=plan.profile.eps
    )
    norms = []
    for step in range(STEPS):
        (window,) = batches_of(plan, 0, 1, plan.global_batch).micro_batches(step * plan.global_batch)
        model(*to_device(window, torch.device("cpu"))).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].float().flatten() for name in sorted(weights)])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b).norm() / b.norm())


def assembled(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every master weight and moment of a checkpoint, whole, from the files of all ranks."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for path in checkpoint.glob("states-*.safetensors"):
        for key, tensor in load_file(path).items():
            whole, _, start = key.rpartition("/")
            pieces.setdefault(whole, {})[int(start)] = tensor
    return {key: torch.cat([found[start] for start in sorted(found)]) for key, found in pieces.items()}


def crossed(plans: dict[str, Plan], saved: dict[str, Path], ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Each profile going on from the checkpoint of the next one in its type, in a circle through all stages."""
    results = {}
    for exact in (True, False):
        names = sorted(name for name in plans if (plans[name].profile.dtype == "fp32") is exact)
        for name, source in zip(names, names[1:] + names[:1], strict=True):
            engine = TrainingEngine(plans[name], ranks, io.StringIO())
            restoring.load(engine, saved[source], print)
            again = saved[source].parent / f"{name}-from-{source}"
            checkpoints.save(engine, again, position_at(STEPS + 2), 1, {})
            loss, norm, _ = one_step(engine, plans[name], STEPS + 2)
            if ranks.rank == 0:
                (one,), (other,) = saved[source].glob("step-*"), again.glob("step-*")
                states, same = assembled(one), assembled(other)
                results[name] = {
                    "source": source,
                    "states": len(states),
                    "states_equal": states.keys() == same.keys()
                    and all(torch.equal(states[key], same[key]) for key in states),
                    "loss": loss,
                    "norm": norm,
                }
    return results


def main(profiles: Path, models_file: Path, corpus: Path) -> None:
    results: dict[str, dict[str, Any]] = {}
    plans: dict[str, Plan] = {}
    folders: dict[str, Path] = {}
    for path in sorted(profiles.glob("*.json")):
        options = TrainOptions(
            ds=str(path), model="small", models_file=models_file, data=corpus, micro_batch=2, accumulation=2, steps=10
        )
        plan = resolve(options, ranks=2)
        ranks = start_ranks(plan.device_kind)
        engine = TrainingEngine(plan, ranks, io.StringIO())
        steps = [one_step(engine, plan, step) for step in range(STEPS)]
        before = weights_of(engine)

        poisoned = {}
        for kind in POISONS:
            # One rank only: the other must neither hang nor step.
            hook = poison(engine.module, kind) if ranks.rank == 1 else None
            poisoned[kind] = one_step(engine, plan, STEPS)[2]
            if hook:
                hook.remove()
        unchanged = weights_of(engine)
        after = one_step(engine, plan, STEPS + 1)
        last = weights_of(engine)

        evaluation = Evaluation(Windows(plan.corpus.val, plan.context), count=5, micro_batch=2)
        validation = evaluation.loss(engine)
        text = sample_text(engine, "Fruits", tokens=4, seed=0)

        saved = corpus.parent / f"checkpoints-{path.stem}"
        plans[path.stem], folders[path.stem] = plan, saved
        checkpoints.save(engine, saved, position_at(STEPS + 2, skipped_steps=3), 1, {})
        going_on = one_step(engine, plan, STEPS + 2)
        resumed_engine = TrainingEngine(plan, ranks, io.StringIO())
        position = restoring.load(resumed_engine, saved, print)[1].position
        resumed = one_step(resumed_engine, plan, STEPS + 2)
        going_on_weights, resumed_weights = weights_of(engine), weights_of(resumed_engine)
        if ranks.rank == 0:
            norms, reference = plain_torch(plan)
            results[path.stem] = {
                "losses": [loss for loss, _, _ in steps],
                "norms": [norm for _, norm, _ in steps],
                "taken": [taken for _, _, taken in steps],
                "reference_norms": norms,
                "worst_tensor": max(relative(before[name], weight) for name, weight in reference.items()),
                "whole_model": relative(flat(before), flat(reference)),
                "poisoned_taken": poisoned,
                "unchanged": all(torch.equal(before[name], unchanged[name]) for name in before),
                "after_taken": after[2],
                "moved": any(not torch.equal(last[name], unchanged[name]) for name in last),
                "finite": all(bool(torch.isfinite(weight).all()) for weight in last.values()),
                "skipped": engine.skipped_steps,
                "validation": validation,
                "sample": text,
                "going_on": going_on[:2],
                "resumed_step": position.step,
                "resumed_equal": resumed == going_on
                and all(torch.equal(resumed_weights[key], going_on_weights[key]) for key in going_on_weights),
            }
    for name, result in crossed(plans, folders, ranks).items():
        results[name]["crossed"] = result
    stop_ranks()
    if ranks.rank == 0:
        print("RESULTS " + json.dumps(results))


main(*map(Path, sys.argv[1:]))
