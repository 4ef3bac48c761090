"""One run per folder: a lock that the kernel gives back when its holder dies, however it dies."""

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from gpt2ds.errors import UserError
from gpt2ds.files import LOCAL_FILE_SYSTEMS, file_system
from gpt2ds.processes import machine, start_ticks

LOCK = ".lock"


class RunLock:
    """A lock that is held; `RunLock.take` makes one. Also a context manager, which releases it."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder = folder
        self._descriptor: int | None = descriptor
        # Closed on exec anyway; this is for children that only fork, whose copy would keep the lock.
        os.register_at_fork(after_in_child=self._close)

    @classmethod
    def take(cls, folder: Path) -> "RunLock":
        """Makes the folder where it is missing, and takes its lock.

        Raises UserError with the holder's pid when another process has it, and when the folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(
                f"The run folder {folder} cannot be written ({error.strerror}): make it writable, "
                "or choose another --out."
            ) from error
        holder = _holder_in_the_way(descriptor, folder)
        if holder is not None:
            os.close(descriptor)
            raise UserError(_refusal(folder, holder))
        pid = os.getpid()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        own = {"pid": pid, "start_ticks": start_ticks(pid), "machine": machine(), "since": since}
        _write(descriptor, json.dumps(own).encode())
        return cls(folder, descriptor)

    def release(self) -> None:
        """Gives the lock back; the file stays, since removing it could part two processes that look for it."""
        if self._descriptor is not None:
            _write(self._descriptor, b"")
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _holder_in_the_way(descriptor: int, folder: Path) -> dict[str, Any] | None:
    """Tries to lock; None when it is ours, else what its holder said of itself, which may be nothing."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(descriptor)
    except OSError:
        return _unjudged(descriptor)  # a file system without locks
    if file_system(folder) in LOCAL_FILE_SYSTEMS:
        return None
    # A network's may have been granted for this host only; of its own processes each kernel knows.
    holder = _unjudged(descriptor)
    if holder and _kernel(str(holder.get("machine"))) == _kernel(machine()) is not None:
        return None
    if holder:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    return holder


def _kernel(machine: str) -> str | None:
    """Which boot of which host, whatever container; None where that is not known."""
    words = machine.split()
    return words[1] if len(words) == 3 and words[1] != "unknown" else None


def _unjudged(descriptor: int) -> dict[str, Any] | None:
    """The holder that the file names, unless it has released the lock or is known to be dead."""
    holder = _holder(descriptor)
    here = holder.get("machine") == machine()
    if not holder or (here and start_ticks(holder.get("pid", 0)) != holder.get("start_ticks")):
        return None
    return holder | {"unjudged": not here}


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    if not holder:
        return f"The run {folder} is in use by another process: wait for it, or choose another --name."
    pid, since = holder.get("pid"), holder.get("since")
    if holder.get("machine") == machine():
        who, stop = f"process {pid} (since {since})", f"stop it with `kill {pid}`"
    else:
        host = str(holder.get("machine")).split()[0]
        who, stop = f"process {pid} on {host} (since {since})", f"stop it there with `kill {pid}`"
    dead = f" If that process has ended, remove {folder / LOCK}." if holder.get("unjudged") else ""
    return f"The run {folder} is in use by {who}: wait for it, {stop}, or choose another --name.{dead}"


def _write(descriptor: int, content: bytes) -> None:
    # Who holds it is only for the message: a full disk does not unlock anything.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)
