"""Which folder a run lives in, and whether what is asked for is the run that is in it already."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2ds.errors import UserError
from gpt2ds.options import TrainOptions
from gpt2ds.plan import Plan


def newest_run(logs: Path) -> Path | None:
    """The run folder with a complete checkpoint that was started or resumed last."""
    plans = [path for path in logs.glob("*/plan.json") if any(path.parent.glob("checkpoints/step-*/manifest.json"))]
    return max(plans, key=lambda path: path.stat().st_mtime).parent if plans else None


def run_folder(options: TrainOptions) -> tuple[Path, TrainOptions, bool]:
    """(the run's folder, the options completed from an earlier session's, whether the run is resumed)."""
    if not options.resume:
        # The launcher starts ranks at slightly different times: rank 0's plan is the one that counts, name included.
        name = options.name or time.strftime("%Y%m%d-%H%M%S")
        if Path(name).name != name or name in (".", ".."):
            raise UserError(f"--name is a name below {options.out}/, not a path: '{name}'.")
        folder = options.out / name
        if (folder / "plan.json").exists():
            raise UserError(
                f"The run folder {folder} exists already: add --resume to go on with it, or choose another --name."
            )
        return folder, options, False
    named = options.out / options.name if options.name else newest_run(options.out)
    if named is None or not (named / "plan.json").is_file():
        where = f"{named} is no run folder" if named else f"no run below {options.out}/ has a checkpoint"
        raise UserError(f"--resume has nothing to go on with: {where}. Leave --resume out to start a new run.")
    return named, replace(options.over(_read_plan(named).get("options", {})), name=named.name), True


def _read_plan(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / 'plan.json'} cannot be read ({error}): choose another --name to start a new one."
        ) from error
    return content


def check_same_run(plan: Plan) -> None:
    """Raises UserError when the folder belongs to another plan than this one, with what differs."""
    earlier = _read_plan(plan.folder).get("identity", {})
    differing = [
        f"{key} was {earlier.get(key)!r} and is now {value!r}"
        for key, value in plan.identity().items()
        if earlier.get(key) != value
    ]
    if differing and all(problem.startswith(("ranks", "global batch")) for problem in differing):
        raise UserError(
            f"The run {plan.folder} was trained on {earlier['ranks']} ranks: resume it with --gpus {earlier['ranks']} "
            f"(or --num_gpus {earlier['ranks']} of the launcher)."
        )
    if differing:
        raise UserError(
            f"The run folder {plan.folder} belongs to another plan: {'; '.join(differing)}. "
            "Repeat the earlier settings to resume it, or choose another --name."
        )
