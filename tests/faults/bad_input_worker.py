"""Runs many command lines in one process, each as `gpt2ds ...` would, and reports how each ended.

A line of JSON in, [arguments, folder], a line of JSON out. Starting a process for each would take minutes.
"""

import io
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

LIMIT_SECONDS = 20
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.symlink", "os.link")

written: list[str] = []


class HangError(BaseException):
    """Not an Exception: nothing that handles errors may swallow it."""


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes every path that is opened for writing, made, moved or removed."""
    opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
    if opened or event in CHANGING:
        written.append(os.fsdecode(arguments[0]) if not isinstance(arguments[0], int) else "")


def stop(number: int, frame: FrameType | None) -> None:
    raise HangError


def snapshot(folder: Path) -> dict[str, Any]:
    """Every file's size, time of change and inode, and every folder."""
    found = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        found[str(path)] = (state.st_size, state.st_mtime_ns, state.st_ino) if not path.is_dir() else None
    return found


def run_one(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Exit code, output and what was done to the disk."""
    from gpt2ds import cli

    before = snapshot(folder)
    written.clear()
    # As Python opens them for a program: what stdout cannot encode is an error, stderr escapes it.
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    code: int | None = None
    crash = None
    os.chdir(folder)
    sys.argv, sys.stdout, sys.stderr = ["gpt2ds", *arguments], out, err
    start = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        cli.main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else -1
    except HangError:
        crash = "hang: " + traceback.format_exc()
    except BaseException:
        crash = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    seconds = time.monotonic() - start
    after = snapshot(folder)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path, 0) != after.get(path, 0))
    outside = [path for path in written if not inside(path, folder)]
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return {
        "code": code,
        "crash": crash,
        "out": texts[0],
        "err": texts[1],
        "seconds": seconds,
        "changed": changed,
        "outside": outside,
    }


def inside(path: str, folder: Path) -> bool:
    """Whether a path that was written to is in the case's own folder, or where libraries keep what is theirs."""
    whole = os.path.normpath(os.path.join(folder, path))
    allowed = (str(folder), os.environ["TMPDIR"])
    return path in ("", "/dev/null") or any(whole == place or whole.startswith(place + os.sep) for place in allowed)


def main() -> None:
    """Case after case, until standard input ends."""
    signal.signal(signal.SIGALRM, stop)
    import gpt2ds.cli  # noqa: F401  what it imports is not a case's doing

    # Nothing that a case prints may pass for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.addaudithook(watch)
    for line in sys.stdin:
        arguments, folder = json.loads(line)
        print(json.dumps(run_one(arguments, Path(folder))), file=answers, flush=True)


if __name__ == "__main__":
    main()
