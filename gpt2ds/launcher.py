"""Starts one process per GPU through DeepSpeed's launcher, for `gpt2ds train --gpus N`."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import FrameType

from gpt2ds.errors import UserError


def under_launcher() -> bool:
    """Whether this process is already one rank of a run (deepspeed, torchrun or a scheduler set its rank)."""
    return "RANK" in os.environ


def launch(ranks: int, arguments: list[str]) -> int:
    """Runs `cli.py arguments` on this many ranks of this machine and waits; returns the launcher's exit code.

    SIGINT and SIGTERM are passed on to the launcher, which passes them on to its ranks; they end with a checkpoint.
    Raises UserError for a number of ranks that makes no sense.
    """
    if ranks < 1:
        raise UserError(f"--gpus must be at least 1, not {ranks}.")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(ranks)]
    if len(devices) < ranks:
        raise UserError(f"--gpus {ranks}, but CUDA_VISIBLE_DEVICES={visible} shows only {len(devices)}.")
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices[:ranks]}).encode()).decode()
    # The launcher itself, not the `deepspeed` program around it: that one ends on SIGTERM and leaves its ranks running.
    command = [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--quiet", f"--world_info={world}"),
        *("--master_addr=127.0.0.1", f"--master_port={_free_port()}"),
        *(str(Path(__file__).with_name("cli.py")), *arguments),
    ]
    # In a session of its own: a terminal's Ctrl-C then reaches only this process, which passes it on once.
    process = subprocess.Popen(command, start_new_session=True)

    def forward(number: int, _: FrameType | None) -> None:
        process.send_signal(number)

    earlier = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
