"""Which process is which: a pid can be used again by another process, and means nothing on another machine.

Linux only, read from /proc: psutil's create_time moves with the system clock, the kernel's own ticks do not.
"""

import os
import socket
from pathlib import Path


def machine() -> str:
    """Names the place in which a pid of this process means something: host, boot and pid namespace.

    Two containers can share the host name, and then see different processes under one pid.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = namespace = "unknown"
    return f"{socket.gethostname()} {boot} {namespace}"


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when it has ended, also when nobody reaped it yet."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in ("Z", "X") else int(fields[19])


def is_stopped(pid: int) -> bool:
    """Whether the process was stopped by a signal (SIGSTOP, Ctrl-Z) or a debugger."""
    fields = _stat(pid)
    return fields is not None and fields[0] in ("T", "t")


def ancestors(pid: int) -> list[int]:
    """The pids of parent, grandparent and so on, as far as this pid namespace shows them."""
    found: list[int] = []
    while (fields := _stat(pid)) is not None and (pid := int(fields[1])) > 0:
        found.append(pid)
    return found


def program(pid: int) -> str:
    """What the process runs: the name of its program, or of the script or module that its Python runs; "" if gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return ""
    name = Path(words[0]).name if words else ""
    if not name.startswith("python"):
        return name
    rest = iter(words[1:])
    for word in rest:
        if word == "-m":
            return next(rest, "")
        if word in ("-X", "-W"):
            next(rest, None)
        elif not word.startswith("-"):
            return Path(word).name
        elif word == "-c":
            break
    return name


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third on (proc_pid_stat(5)): state, parent, ..., start time at index 19."""
    try:
        content = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return content.rpartition(")")[2].split()
