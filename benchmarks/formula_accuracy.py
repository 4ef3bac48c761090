"""The memory formula beside a trace of the very DeepSpeed engine, over configurations that a seed draws.

    python benchmarks/formula_accuracy.py [--kind KIND ...] [--count N ...] [--seed N] [--again]

Needs no GPU: both figures are predictions for one, the peak of the last rank over the second optimizer step. Traces
already recorded for the same case and versions are taken again unless --again is given; a whole draw takes about an
hour on two cores.
"""

import argparse
import json
import statistics
import textwrap
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gpt2ds.devices import this_machine
from gpt2ds.memory.formula import MIB
from gpt2ds.probe.formula_check import KINDS, LIMITS, Case, draw, error, traced

RESULTS = Path(__file__).parent / "results" / "formula_accuracy.json"
COUNTS = {"replicated": 160, "zero3": 32, "offload": 24}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--count", type=int, help="cases of each kind; default: " + str(COUNTS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="trace also what is recorded")
    arguments = parser.parse_args()
    versions = {package: version(package) for package in ("torch", "deepspeed")}
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"draws": {}}
    draws = results["draws"]
    machine = this_machine()
    results |= {
        "what": "peak memory of the last rank by the formula and by a trace of DeepSpeed on meta tensors; no GPU",
        "limits_percent": {kind: 100 * limit for kind, limit in LIMITS.items()},
        "machine": {"cpu": machine.cpu_name, "cores": machine.cores, "gpu": None},
    }
    for kind in arguments.kind:
        name = f"{kind}, seed {arguments.seed}"
        cases = draw(arguments.seed, arguments.count or COUNTS[kind], kind)
        usable = name in draws and not arguments.again and draws[name]["versions"] == versions
        rows = draws[name]["rows"] if usable else []
        known = [row["case"] for row in rows]
        new = [case for case in cases if asdict(case) not in known]
        for case, seen in zip(new, traced(new, processes=arguments.processes), strict=True):
            rows.append({"case": asdict(case), "traced_peak_bytes": seen.peak_bytes, "traced_phase": seen.phase})
            print(f"{kind}: {100 * error(case, seen.peak_bytes):+.3f}%  {case}", flush=True)
            draws[name] = {"versions": versions} | summary(kind, rows)
            RESULTS.write_text(as_text(results), encoding="utf-8")
    for name, drawn in draws.items():
        # Also those that were not asked for: the formula may have changed since.
        drawn |= summary(name.partition(",")[0], drawn["rows"])
        print(f"{name}: {drawn['count']} cases, worst {drawn['worst_percent']}%, mean {drawn['mean_percent']}%")
    RESULTS.write_text(as_text(results), encoding="utf-8")


def recorded(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every case of every draw with its trace."""
    return [row for drawn in results["draws"].values() for row in drawn["rows"]]


def summary(kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One draw: its errors by the present formula, and every case."""
    errors = [error(Case(**row["case"]), row["traced_peak_bytes"]) for row in rows]
    return {
        "count": len(rows),
        "worst_percent": round(100 * max(map(abs, errors)), 4),
        "mean_percent": round(100 * statistics.fmean(map(abs, errors)), 4),
        "beyond_limit": sum(abs(one) > LIMITS[kind] for one in errors),
        "rows": [
            row | {"traced_peak_mib": round(row["traced_peak_bytes"] / MIB, 1), "error_percent": round(100 * one, 4)}
            for row, one in zip(rows, errors, strict=True)
        ],
    }


def as_text(results: dict[str, Any]) -> str:
    """JSON with a line for each case."""
    text = json.dumps(results, indent=1)
    for row in recorded(results):
        text = text.replace(textwrap.indent(json.dumps(row, indent=1), "    ").lstrip(), json.dumps(row))
    return text + "\n"


if __name__ == "__main__":
    main()
