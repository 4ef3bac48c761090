"""What memory_accuracy.py has measured: read again, summed up by group and limit, as a table and a picture."""

import io
import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt2ds.files import write_atomically
from gpt2ds.memory.formula import MIB
from gpt2ds.runlog.plots import GREY, RANK_COLOURS, RED

GIB_IN_MIB = 1024

GOALS: dict[str, tuple[float, float | None]] = {
    "ZeRO-0, 1, 2": (1.0, 3.0),
    "ZeRO-3": (2.0, None),
    "offload": (2.0, None),
}
"""In percent of measured: most at the median, most at the worst."""

COLOURS = dict(zip(GOALS, RANK_COLOURS, strict=False))


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The newest line of each setting. A last line that was cut off counts as not written."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[result["key"]] = result
    return found


def is_final(result: dict[str, Any]) -> bool:
    """Whether running the setting again would say the same."""
    return result["record"]["result"] in ("measured", "out of memory")


def group_of(record: dict[str, Any]) -> str:
    """Which goal a setting is held to."""
    if record["offload_optimizer"] or record["offload_param"] or record["recompute"] == "host":
        return "offload"
    return "ZeRO-3" if record["zero_stage"] == 3 else "ZeRO-0, 1, 2"


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Differences per group, the limits by real runs, and every setting in short.

    A difference is predicted above (+) or below (-) the fullest rank's peak of allocated bytes, in % of that.
    """
    short = []
    for result in results:
        record = result["record"]
        row = {"key": result["key"], "role": result["role"], "result": record["result"]}
        row["predicted_mib"] = round(result["predicted_bytes"] / MIB, 1)
        if record["result"] == "measured":
            allocated = max(record["peak_bytes"])
            row |= {"group": group_of(record), "allocated_mib": round(allocated / MIB, 1)}
            row["reserved_mib"] = round(max(record["reserved_bytes"] or [0]) / MIB, 1) or None
            row["difference_percent"] = round(100 * (result["predicted_bytes"] / allocated - 1), 2)
        else:
            row["why"] = record["why"]
        short.append(row)
    groups = {}
    for group in GOALS:
        rows = [row for row in short if row.get("group") == group]
        if rows:
            worst = max(rows, key=lambda row: abs(row["difference_percent"]))
            slack = [100 * (row["reserved_mib"] / row["allocated_mib"] - 1) for row in rows if row["reserved_mib"]]
            groups[group] = {
                "measured": len(rows),
                "median_percent": round(statistics.median(abs(row["difference_percent"]) for row in rows), 2),
                "worst_percent": worst["difference_percent"],
                "worst_at": worst["key"],
                "most_reserved_above_allocated_percent": round(max(slack), 2) if slack else None,
            }
    return {"groups": groups, "limits": limits(short), "settings": short}


def limits(short: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each profile: whether its largest predicted micro-batch ran and 1.1 times that did not; None: not known."""
    outcome = {"measured": True, "out of memory": False}
    pairs: dict[str, dict[str, Any]] = {}
    for row in short:
        if row["role"] != "grid":
            model, profile, recompute, micro_batch = row["key"].split()
            pair = pairs.setdefault(profile, {"profile": profile, "model": model, "recompute": recompute})
            runs = outcome.get(row["result"])
            pair |= {row["role"]: int(micro_batch), f"{row['role']}_runs": runs}
            if row["role"] == "largest" and runs:
                pair |= {"allocated_mib": row["allocated_mib"], "reserved_mib": row["reserved_mib"]}
    return list(pairs.values())


def table(report: dict[str, Any]) -> str:
    """The groups beside their goals, and the limits, as lines for a terminal."""
    lines = [report["what"], ""]
    for name, group in report["groups"].items():
        median, worst = GOALS[name]
        met = group["median_percent"] <= median and (worst is None or abs(group["worst_percent"]) <= worst)
        goal = f"{median:g}%" + (f" and {worst:g}%" if worst else "")
        slack = group["most_reserved_above_allocated_percent"]
        lines.append(
            f"{name}: {group['measured']} settings, median {group['median_percent']:.2f}%, worst "
            f"{group['worst_percent']:+.2f}% ({group['worst_at']}); goal {goal}: {'met' if met else 'MISSED'}"
            + (f"; reserved up to {slack:.1f}% above allocated" if slack is not None else "")
        )
    words = {True: "runs", False: "out of memory", None: "not known"}
    lines += ["", "Largest micro-batch predicted, and 1.1 times that:"] if report["limits"] else []
    for pair in report["limits"]:
        sizes = "; ".join(
            f"{pair[role]} {words[pair[f'{role}_runs']]}" for role in ("largest", "beyond") if role in pair
        )
        lines.append(f"{pair['profile']} ({pair['model']}, {pair['recompute']}): {sizes}")
    failed = [row for row in report["settings"] if row["result"] not in ("measured", "out of memory")]
    lines += [f"{row['key']}: {row['result']}: {row['why']}" for row in failed]
    return "\n".join(lines)


def write_plot(report: dict[str, Any], path: Path) -> None:
    """Predicted against measured, the difference in percent, and how the limits came out."""
    figure = Figure(figsize=(11, 6.5), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2), height_ratios=(3, 2))
    above = figure.add_subplot(grid[0, 0])
    below = figure.add_subplot(grid[1, 0], sharex=above)
    figure.suptitle(_title(report), x=0.01, ha="left", fontsize=10, fontweight="bold")
    _against(above, report)
    _difference(below, report)
    _limits(figure.add_subplot(grid[:, 1]), report)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    write_atomically(path, image.getvalue())


def _title(report: dict[str, Any]) -> str:
    device = report.get("device", {}).get("name", "")
    if report["rehearsal"]:
        return f"REHEARSAL on {device}: resident memory of CPU processes, which no prediction here is about"
    return f"GPU memory, predicted and measured, on {device} as a card of {report['gpu_memory_gb']:g} GB"


def _points(report: dict[str, Any], group: str) -> list[tuple[float, float, float]]:
    """(measured GiB, predicted GiB, difference in percent) of each setting of a group that ran."""
    return [
        (row["allocated_mib"] / GIB_IN_MIB, row["predicted_mib"] / GIB_IN_MIB, row["difference_percent"])
        for row in report["settings"]
        if row.get("group") == group
    ]


def _against(axes: Axes, report: dict[str, Any]) -> None:
    room = report["room_mib"] / GIB_IN_MIB
    axes.plot([0, room], [0, room], color=GREY, linewidth=0.8, zorder=1)
    for group, colour in COLOURS.items():
        if points := _points(report, group):
            measured, predicted, _ = zip(*points, strict=True)
            label = f"{group} ({len(points)})"
            axes.plot(measured, predicted, "o", color=colour, markersize=5, alpha=0.75, markeredgewidth=0, label=label)
    axes.axvline(room, color=RED, linewidth=1.2, label=f"can be reserved: {report['room_mib']:,} MiB")
    axes.set_ylabel("predicted peak (GiB)")
    axes.tick_params(labelbottom=False)
    axes.legend(fontsize=8.5, frameon=False, loc="upper left")
    _plain(axes)


def _difference(axes: Axes, report: dict[str, Any]) -> None:
    axes.axhspan(-1, 1, color=GREY, alpha=0.18, linewidth=0)
    axes.axhline(0, color=GREY, linewidth=0.8)
    for group, colour in COLOURS.items():
        if points := _points(report, group):
            measured, _, percent = zip(*points, strict=True)
            axes.plot(measured, percent, "o", color=colour, markersize=5, alpha=0.75, markeredgewidth=0)
    axes.axvline(report["room_mib"] / GIB_IN_MIB, color=RED, linewidth=1.2)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -3.3), max(high, 3.3))
    axes.set_ylabel("predicted above\nmeasured (%)")
    axes.set_xlabel("measured peak of allocated memory (GiB); grey: within 1%")
    axes.set_xlim(left=0)
    _plain(axes)


def _limits(axes: Axes, report: dict[str, Any]) -> None:
    """A line for each profile: what its largest predicted micro-batch takes, and how 1.1 times that ended."""
    pairs = report["limits"]
    room = report["room_mib"] / GIB_IN_MIB
    words = {True: "runs", False: "does not", None: "?"}
    labels = []
    for place, pair in enumerate(pairs):
        sizes = ", ".join(
            f"{pair[role]} {words[pair[f'{role}_runs']]}" for role in ("largest", "beyond") if role in pair
        )
        labels.append(f"{pair['profile']}\n{sizes}")
        good = pair.get("largest_runs") and pair.get("beyond_runs") is False
        colour = RANK_COLOURS[2] if good else GREY
        if pair.get("allocated_mib"):
            allocated = pair["allocated_mib"] / GIB_IN_MIB
            axes.plot([allocated], [place], "o", color=colour, markersize=5)
            if pair["reserved_mib"]:
                axes.plot(
                    [allocated, pair["reserved_mib"] / GIB_IN_MIB], [place, place], "|-", color=colour, linewidth=1.2
                )
        elif pair.get("largest_runs") is False:
            axes.plot([room], [place], "x", color=RED, markersize=7)
    axes.axvline(room, color=RED, linewidth=1.2)
    axes.set_yticks(range(len(pairs)), labels, fontsize=7)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.set_title(
        "largest predicted micro-batch and 1.1 times that\n(green: as it should be): GiB allocated to reserved",
        fontsize=8.5,
    )
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
