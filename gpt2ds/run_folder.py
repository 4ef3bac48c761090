"""Which folder a run lives in, and whether what is asked for is the run that is in it already."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2ds.errors import UserError
from gpt2ds.files import not_writable, write_atomically
from gpt2ds.options import TrainOptions
from gpt2ds.plan import Plan

# What a session leaves when it came to its end by itself.
OUTCOME = "outcome.json"

# Set by `restarts`: the folder of a run that failed before its first complete checkpoint may be started in again.
RESTART_VARIABLE = "GPT2DS_RESTART"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that were finished, oldest first; whether they are still whole is not looked at."""
    return sorted(manifest.parent for manifest in folder.glob("checkpoints/step-*/manifest.json"))


def newest_run(logs: Path) -> Path | None:
    """The run folder with a complete checkpoint that was started or resumed last."""
    plans = [path for path in logs.glob("*/plan.json") if complete_checkpoints(path.parent)]
    return max(plans, key=lambda path: path.stat().st_mtime).parent if plans else None


def run_folder(options: TrainOptions) -> tuple[Path, TrainOptions, bool]:
    """(the run's folder, the options completed from an earlier session's, whether the run is resumed)."""
    if not options.resume:
        # The launcher starts ranks at slightly different times: rank 0's plan is the one that counts, name included.
        name = options.name or time.strftime("%Y%m%d-%H%M%S")
        if Path(name).name != name or name in (".", ".."):
            raise UserError(f"--name is a name below {options.out}/, not a path: '{name}'.")
        folder = options.out / name
        _check_place(folder)
        starts_again = bool(os.environ.get(RESTART_VARIABLE)) and not complete_checkpoints(folder)
        if (folder / "plan.json").exists() and not starts_again:
            raise UserError(
                f"The run folder {folder} exists already: add --resume to go on with it, or choose another --name."
            )
        return folder, options, False
    named = options.out / options.name if options.name else newest_run(options.out)
    if named is None or not (named / "plan.json").is_file():
        where = f"{named} is no run folder" if named else f"no run below {options.out}/ has a checkpoint"
        raise UserError(f"--resume has nothing to go on with: {where}. Leave --resume out to start a new run.")
    earlier = _read_plan(named)["options"]
    # The global batch stays, and on other ranks that takes another accumulation.
    earlier = {key: value for key, value in earlier.items() if key != "accumulation"}
    return named, replace(options.over(earlier), name=named.name), True


def _check_place(folder: Path) -> None:
    """UserError when no folder of that name can be made there, which would show only after everything is loaded."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        (there / folder.name).exists()  # fails where the name is too long, which is not seen below a missing folder
    except OSError as error:
        raise UserError(f"No run folder can be named {folder} ({error.strerror}): choose another --name.") from error
    if not there.is_dir():
        raise UserError(
            f"{there} is a file, so the run folder {folder} cannot be made: choose another --out or --name."
        )


def _read_plan(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
        if missing := [name for name in ("options", "identity") if not isinstance(content.get(name), dict)]:
            raise ValueError(f"it has no {' and no '.join(missing)}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder / 'plan.json'} cannot be read ({error}): choose another --name to start a new one."
        ) from error
    return content


def earlier_global_batch(folder: Path) -> int | None:
    """Sequences per optimizer step of the sessions before; None where the plan does not say."""
    global_batch = _read_plan(folder).get("identity", {}).get("global batch")
    return global_batch if isinstance(global_batch, int) and global_batch > 0 else None


def check_same_run(plan: Plan) -> None:
    """Raises UserError when the folder belongs to another plan than this one, with what differs."""
    earlier = _read_plan(plan.folder)["identity"]
    differing = [
        f"{key} was {earlier.get(key)!r} and is now {value!r}"
        for key, value in plan.identity().items()
        if earlier.get(key) != value
    ]
    if differing:
        raise UserError(
            f"The run folder {plan.folder} belongs to another plan: {'; '.join(differing)}. "
            "Repeat the earlier settings to resume it, or choose another --name."
        )


def write_plan(plan: Plan) -> str | None:
    """Writes what a session is into its folder; a sentence when the disk does not take it."""
    try:
        (plan.folder / OUTCOME).unlink(missing_ok=True)  # the earlier session's
        write_atomically(plan.folder / "ds_config.json", json.dumps(plan.ds_config(), indent=1).encode())
        # Last: a folder with a plan is a run, and a new one of that name would be refused.
        write_atomically(plan.folder / "plan.json", json.dumps(plan.to_dict(), indent=1).encode())
    except OSError as error:
        return not_writable(plan.folder, error)
    return None
