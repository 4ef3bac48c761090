"""One of two ranks: trains the small model under every profile of a folder and compares it with plain torch.

Profiles in fp32 are compared with one process without DeepSpeed, recomputation or chunks, tensor by tensor: the
gradients of the first step and the weights after the last. The others keep their states in 16 or 8 bits and are trained
for themselves. Prints a JSON object of results on rank 0. Arguments: folder of profiles, models file, corpus, and the
folder that holds the package bitsandbytes.
"""

import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from rank_steps import batches_of, position_at, weights_of

from gpt2ds.gpt2.loss import whole_cross_entropy
from gpt2ds.gpt2.model import GPT2
from gpt2ds.options import TrainOptions
from gpt2ds.plan import Plan
from gpt2ds.planning import resolve
from gpt2ds.training import checkpoints, restoring
from gpt2ds.training.engine import TrainingEngine, gather_numbers, parameter_groups, start_ranks, stop_ranks
from gpt2ds.training.evaluation import to_device

LR = 1e-3
STEPS = 20
# So that the token counts of both micro-batches, 4 and 1, leave a remainder of one: 124 = 3 · 41 + 1, 31 = 3 · 10 + 1.
CONTEXT = 31

Tensors = dict[str, torch.Tensor]


def gradients_of(engine: TrainingEngine) -> Tensors:
    """The whole gradients of all ranks' micro-batches together, as they stand between the last backward and the step.

    By then DeepSpeed has divided them by the accumulation and averaged them over the ranks.
    """
    from deepspeed.utils import safe_get_full_grad

    if engine.plan.profile.zero_stage == 0:
        found = {name: parameter.grad for name, parameter in engine.module.named_parameters()}
    else:
        found = {name: safe_get_full_grad(parameter) for name, parameter in engine.module.named_parameters()}
    return {name: gradient.detach().clone() for name, gradient in found.items()}


def one_step(engine: TrainingEngine, step: int, *, with_gradients: bool = False) -> tuple[float, Tensors]:
    """The mean loss over all ranks, and the gradients where they are asked for."""
    plan, ranks = engine.plan, engine.ranks
    batches = batches_of(plan, ranks.rank, ranks.world_size, plan.micro_batch)
    loss = 0.0
    for number, window in enumerate(batches.micro_batches(step * plan.global_batch)):
        if number:
            engine.end_micro_step()
        loss += float(engine.micro_step(*to_device(window, ranks.device)))
    gradients = gradients_of(engine) if with_gradients else {}
    _, taken = engine.optimizer_step(LR)
    assert taken
    losses = gather_numbers([loss / plan.accumulation], ranks.device)
    return sum(row[0] for row in losses) / len(losses), gradients


def plain_torch(plan: Plan, norm_type: torch.dtype) -> tuple[float, float, Tensors, Tensors]:
    """First loss, gradient norm and gradients, and last weights, of the whole global batch in one piece.

    norm_type: of the squares that are summed for clipping. On a CPU torch adds the 1.6 million of the token embedding
    one after the other: in fp32 that norm is wrong by 3e-6 to 6e-4 here, and the weights by 4e-5 after 20 steps.
    """
    torch.manual_seed(plan.options.get("seed"))
    model = GPT2(plan.model)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, plan.profile.weight_decay), lr=LR, betas=plan.profile.betas, eps=plan.profile.eps
    )
    first_loss, first_norm, gradients = 0.0, 0.0, {}
    for step in range(STEPS):
        (window,) = batches_of(plan, 0, 1, plan.global_batch).micro_batches(step * plan.global_batch)
        ids, targets = to_device(window, torch.device("cpu"))
        loss = whole_cross_entropy(model.hidden(ids).flatten(0, 1), model.wte.weight, targets.flatten())
        loss.backward()
        if step == 0:
            first_loss = float(loss.detach())
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        norm = torch.nn.utils.get_total_norm([parameter.grad.to(norm_type) for parameter in model.parameters()])
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), plan.profile.gradient_clipping, norm.float())
        first_norm = first_norm or float(norm)
        optimizer.step()
        optimizer.zero_grad()
    return first_loss, first_norm, gradients, {name: parameter.detach() for name, parameter in model.named_parameters()}


def worst(tensors: Tensors, expected: Tensors) -> tuple[float, str]:
    """The tensor that is furthest from the expected one in ||a-b||/||b||."""
    assert tensors.keys() == expected.keys()
    return max((float((tensors[name] - b).norm() / b.norm()), name) for name, b in expected.items())


def compared(plan: Plan, engine: TrainingEngine, reference: Any) -> dict[str, Any]:
    loss, gradients = one_step(engine, 0, with_gradients=True)
    for step in range(1, STEPS):
        one_step(engine, step)
    weights = weights_of(engine)
    if not weights:
        return {}
    plain_loss, plain_norm, plain_gradients, plain_weights = reference
    return {
        "loss": abs(loss / plain_loss - 1),
        "gradients": worst(gradients, plain_gradients),
        "weights": worst(weights, plain_weights),
        "clipped": plain_norm > plan.profile.gradient_clipping,
        "chunks": [plan.micro_batch * plan.context, plan.loss_chunk],
        "recompute": plan.recompute,
        "stage": plan.profile.zero_stage,
        "accumulation": plan.accumulation,
    }


def trained(plan: Plan, engine: TrainingEngine, folder: Path) -> dict[str, Any]:
    losses = [one_step(engine, step)[0] for step in range(STEPS)]
    checkpoints.save(engine, folder, position_at(STEPS), 1, {})
    going_on = [one_step(engine, step)[0] for step in (STEPS, STEPS + 1)]
    again = TrainingEngine(plan, engine.ranks, io.StringIO())
    restoring.load(again, folder, print)
    resumed = [one_step(again, step)[0] for step in (STEPS, STEPS + 1)]
    weights, resumed_weights = weights_of(engine), weights_of(again)
    if not weights:
        return {}
    states = engine.optimizer.optimizer.state.values()
    return {
        "losses": losses,
        "resumed_losses_equal": resumed == going_on,
        "resumed_weights_equal": all(torch.equal(resumed_weights[name], weight) for name, weight in weights.items()),
        "state_types": sorted(
            {str(tensor.dtype) for state in states for tensor in state.values() if getattr(tensor, "dim", int)() > 0}
        ),
    }


def main(profiles: Path, models_file: Path, corpus: Path, packages: Path) -> None:
    sys.path.append(str(packages))
    # DeepSpeed's calls of torch's older collectives warn every time, and nobody reads rank 1's pipe before rank 0 ends.
    warnings.simplefilter("ignore", FutureWarning)
    results: dict[str, Any] = {}
    references: dict[torch.dtype, Any] = {}
    for path in sorted(profiles.glob("*.json")):
        options = TrainOptions(
            ds=str(path), model="small", models_file=models_file, data=corpus, context=CONTEXT, steps=100
        )
        plan = resolve(options, ranks=2)
        ranks = start_ranks(plan.device_kind)
        engine = TrainingEngine(plan, ranks, io.StringIO())
        if plan.profile.dtype == "fp32":
            # ZeRO sums in fp64; without it DeepSpeed clips as torch does, in the gradients' own fp32.
            norm_type = torch.float64 if plan.profile.zero_stage else torch.float32
            if ranks.rank == 0 and norm_type not in references:  # all profiles have one global batch
                references[norm_type] = plain_torch(plan, norm_type)
            results[path.stem] = compared(plan, engine, references.get(norm_type))
        else:
            results[path.stem] = trained(plan, engine, profiles / f"checkpoints-{path.stem}")
    stop_ranks()
    if ranks.rank == 0:
        print("RESULTS " + json.dumps(results))


main(*map(Path, sys.argv[1:]))
