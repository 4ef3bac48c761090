"""Starts one process per GPU through DeepSpeed's launcher, for `gpt2ds train --gpus N`."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import psutil

from gpt2ds.devices import free_port, this_machine
from gpt2ds.errors import UserError


def under_launcher() -> bool:
    """Whether this process is already one rank of a run (deepspeed, torchrun or a scheduler set its rank)."""
    return "RANK" in os.environ


def launch(ranks: int, arguments: list[str]) -> int:
    """Runs `cli.py arguments` on this many ranks of this machine and waits; returns the launcher's exit code.

    SIGINT, SIGTERM and SIGHUP are passed on to the ranks, which end with a checkpoint.
    Raises UserError for a number of ranks that makes no sense.
    """
    if ranks < 1:
        raise UserError(f"--gpus must be at least 1, not {ranks}.")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(index) for index in range(ranks)] if not visible else visible.split(",")
    if len(devices) < ranks:
        raise UserError(f"--gpus {ranks}, but CUDA_VISIBLE_DEVICES={visible} shows only {len(devices)}.")
    environment = dict(os.environ)
    if this_machine().kind == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"  # also when cards are hidden on purpose: the launcher would show them
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices[:ranks]}).encode()).decode()
    # The launcher itself, not the `deepspeed` program around it: that one ends on SIGTERM and leaves its ranks running.
    command = [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--log_level=critical", f"--world_info={world}"),
        *("--master_addr=127.0.0.1", f"--master_port={free_port()}"),
        *(str(Path(__file__).with_name("cli.py")), *arguments),
    ]
    # In a session of its own: a terminal's Ctrl-C then reaches only this process, which passes it on once.
    process = subprocess.Popen(command, start_new_session=True, env=environment)
    received = 0

    def forward(number: int, _: FrameType | None) -> None:
        nonlocal received
        received += 1
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks_running = psutil.Process(process.pid).children()
            # To the ranks themselves: the launcher would give each 30 s and then kill it, in the middle of a save. They
            # end alike and by themselves, and so does it. It gets the signal when the user insists.
            for rank in ranks_running:
                rank.send_signal(number)
            if received > 1 or not ranks_running:
                process.send_signal(signal.SIGTERM)

    earlier = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        return process.wait()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
