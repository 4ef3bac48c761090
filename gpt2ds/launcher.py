"""Starts one process per GPU through DeepSpeed's launcher and stays until none of them lives. What their end means is
for `restarts` to say.
"""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import psutil

from gpt2ds.devices import free_port, this_machine
from gpt2ds.errors import RankLostError, UserError
from gpt2ds.processes import start_ticks
from gpt2ds.supervisors import supervisor_variable
from gpt2ds.training.guard import STOP_SIGNALS, Repeats

POLL_SECONDS = 0.2

# Ranks whose launcher died notice it, save and leave by themselves, by their own timeout at the latest. Not for ever:
# they hold the GPUs that a restart needs.
ORPHANS_SECONDS = 900.0
UNKILLABLE_SECONDS = 60.0


def under_launcher() -> bool:
    """Whether this process is already one rank of a run (deepspeed, torchrun or a scheduler set its rank)."""
    return "RANK" in os.environ


class Launcher:
    """Runs `cli.py train ...` on so many ranks of this machine; a context manager, while which signals are passed on.

    SIGINT, SIGTERM and SIGHUP go to the ranks, which end with a checkpoint; SIGUSR1 as well, to save and go on.
    """

    def __init__(self, ranks: int) -> None:
        """Raises UserError for a number of ranks that makes no sense."""
        if ranks < 1:
            raise UserError(f"--gpus must be at least 1, not {ranks}.")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = [str(index) for index in range(ranks)] if not visible else visible.split(",")
        if len(devices) < ranks:
            raise UserError(f"--gpus {ranks}, but CUDA_VISIBLE_DEVICES={visible} shows only {len(devices)}.")
        self.ranks = ranks
        self.received: list[int] = []
        """The signals to stop that came so far."""
        self._repeats = Repeats()
        self._insisted = False
        self._world = base64.urlsafe_b64encode(json.dumps({"localhost": devices[:ranks]}).encode()).decode()
        self._process: subprocess.Popen[bytes] | None = None
        self._ranks: dict[int, int] = {}
        """The ranks of this start that were seen, and when each one started."""
        self._earlier: dict[int, object] = {}

    def run(self, arguments: list[str], **environment: str) -> int:
        """One start with these arguments and more environment; returns the launcher's exit code once no rank lives.

        Below 0 it is the signal that killed the launcher. An exit code of 0 says little: see `restarts`.
        """
        more = environment | supervisor_variable()
        if this_machine().kind == "cpu":
            more["DS_ACCELERATOR"] = "cpu"  # also when cards are hidden on purpose: the launcher would show them
        # The launcher itself, not the `deepspeed` program around it: that one ends on SIGTERM and leaves its ranks
        # running.
        command = [
            # -P: the folder that the user stands in is no place to import from.
            *(sys.executable, "-u", "-P", "-m", "deepspeed.launcher.launch", "--log_level=critical"),
            *(f"--world_info={self._world}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"),
            *(str(Path(__file__).with_name("cli.py")), *arguments),
        ]
        self._ranks = {}
        # Inherited: a rank that is still importing must not die of a request to save.
        asked_to_save = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        # In a session of its own: a terminal's Ctrl-C then reaches only this process, which passes it on once.
        process = self._process = subprocess.Popen(command, start_new_session=True, env=os.environ | more)
        signal.signal(signal.SIGUSR1, asked_to_save)
        if self.received:  # between two starts
            process.terminate()
        while process.poll() is None:
            self._note_ranks()
            time.sleep(POLL_SECONDS)
        self._await_orphans()
        return process.returncode

    def __enter__(self) -> "Launcher":
        for number in (*STOP_SIGNALS, signal.SIGUSR1):
            # nohup ignores SIGHUP for all that it starts; a hang-up is then no wish to stop.
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._earlier[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _forward(self, number: int, _: FrameType | None) -> None:
        if number != signal.SIGUSR1:
            self.received.append(number)
            self._insisted |= self._repeats.insists(number)
        if self._process is None:
            return
        self._note_ranks()
        alive = self._alive()
        # To the ranks themselves: the launcher would give each 30 s and then kill it, in the middle of a save. They
        # end alike and by themselves, and so does it. It gets the signal when the user insists.
        for rank in alive:
            _kill(rank, number)
        if number != signal.SIGUSR1 and (self._insisted or not alive):
            self._process.send_signal(signal.SIGTERM)

    def _note_ranks(self) -> None:
        if self._process is None or len(self._ranks) == self.ranks:
            return
        try:
            children = psutil.Process(self._process.pid).children()
        except psutil.NoSuchProcess:
            return
        for child in children:
            if (start := start_ticks(child.pid)) is not None:
                self._ranks.setdefault(child.pid, start)

    def _alive(self) -> list[int]:
        return [rank for rank, start in self._ranks.items() if start_ticks(rank) == start]

    def _await_orphans(self) -> None:
        """Ranks outlive a launcher that was killed; their GPUs and folder are free only when they end."""
        deadline = time.monotonic() + ORPHANS_SECONDS
        while alive := self._alive():
            if time.monotonic() > deadline + UNKILLABLE_SECONDS:
                pids = ", ".join(map(str, alive))
                raise RankLostError(
                    f"Process {pids} cannot be killed, as when a GPU's driver hangs: restart the machine."
                )
            if time.monotonic() > deadline or self._insisted:
                for rank in alive:
                    _kill(rank, signal.SIGKILL)
            time.sleep(POLL_SECONDS)


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
