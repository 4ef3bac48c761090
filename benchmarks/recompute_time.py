"""What each recompute policy costs in time on this machine, beside the arithmetic that it is predicted to add.

    python benchmarks/recompute_time.py [--rounds 9] [--layers 3] [--context 512] [--micro-batch 1]

Blocks of gpt2_large's width in fp32, forward and backward, in one process. The vocabulary is cut with the layers, so
that the head has the share of the work that it has in the whole gpt2_large; the prediction is for the very shape that
runs. Every measurement of a policy stands between two of "none" and is divided by their mean; the median over the
rounds counts. About 5 minutes on two cores.
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

import torch

from gpt2ds.devices import this_machine
from gpt2ds.gpt2.config import MODELS, GPT2Config
from gpt2ds.gpt2.model import GPT2
from gpt2ds.gpt2.policies import POLICIES, recomputed_flops_per_token
from gpt2ds.gpt2.recompute import Recompute

RESULTS = Path(__file__).parent / "results"
LARGE = MODELS["gpt2_large"]
GOAL_POINTS = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = GPT2Config(
        name="large_cut",
        emb_dim=LARGE.emb_dim,
        n_heads=LARGE.n_heads,
        n_layers=arguments.layers,
        context_length=arguments.context,
        vocab_size=round(LARGE.vocab_size * arguments.layers / LARGE.n_layers),
    )
    policies = [name for name in POLICIES if name not in ("none", "host")]  # "host" needs CUDA
    torch.manual_seed(0)
    model = GPT2(config)
    ids = torch.randint(0, config.vocab_size, (arguments.micro_batch, arguments.context))

    for policy in ("none", *policies):
        seconds_of(model, policy, ids)
    ratios: dict[str, list[float]] = {policy: [] for policy in policies}
    fastest: dict[str, float] = dict.fromkeys(policies, float("inf"))
    plain: list[float] = []
    order = random.Random(0)
    for round_ in range(arguments.rounds):
        before = seconds_of(model, "none", ids)
        for policy in order.sample(policies, len(policies)):
            own = seconds_of(model, policy, ids)
            after = seconds_of(model, "none", ids)
            ratios[policy].append(2 * own / (before + after))
            fastest[policy] = min(fastest[policy], own)
            plain += [before, after]
            before = after
        print(
            f"round {round_ + 1}: " + "  ".join(f"{name} {ratios[name][-1] - 1:+.1%}" for name in policies), flush=True
        )

    machine = this_machine()
    result = {
        "what": "extra time of forward and backward under each recompute policy, and the extra FLOPs predicted for"
        " this very shape",
        "machine": {"cpu": machine.cpu_name, "cores": machine.cores, "gpu": None},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": arguments.threads,
        "dtype": "fp32",
        "shape": {key: value for key, value in config.to_dict().items() if key != "name"},
        "micro_batch": arguments.micro_batch,
        "rounds": arguments.rounds,
        "gigaflop_per_token": round(config.flops_per_token(arguments.context) / 1e9, 4),
        "plain_seconds": {"median": round(statistics.median(plain), 4), "fastest": round(min(plain), 4)},
        "policies": {},
    }
    rows: dict[str, dict[str, object]] = {}
    for policy in policies:
        predicted = 100 * recomputed_flops_per_token(config, policy, arguments.context)
        predicted /= config.flops_per_token(arguments.context)
        extra = sorted(100 * (ratio - 1) for ratio in ratios[policy])
        measured = statistics.median(extra)
        rows[policy] = {
            "predicted_percent": round(predicted, 2),
            "measured_percent": round(measured, 2),
            "measured_quartiles": [round(extra[len(extra) // 4], 2), round(extra[-1 - len(extra) // 4], 2)],
            "fastest_to_fastest_percent": round(100 * (fastest[policy] / min(plain) - 1), 2),
            "points_apart": round(measured - predicted, 2),
            "within_goal": abs(measured - predicted) <= GOAL_POINTS,
        }
        print(f"{policy:10} predicted {predicted:+6.2f}%  measured {measured:+6.2f}%")
    result["policies"] = rows
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "recompute_time.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def seconds_of(model: GPT2, policy: str, ids: torch.Tensor) -> float:
    """One forward and backward pass under a policy, by the same model."""
    model.recompute = Recompute(policy, model.config)
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    model(ids, ids).backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
