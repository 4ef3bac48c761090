"""The programs that started this rank and would end it: DeepSpeed's launcher and runner, torchrun, `gpt2ds train`.

They can die and leave their ranks running (a kill -9 of deepspeed.launcher.launch, a SIGTERM to the `deepspeed`
program), and nobody then ends the run. A shell is none of them: a logout does not end a run under nohup.
"""

import os

from gpt2ds.processes import ancestors, program, start_ticks

LAUNCHERS = {"deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "torch.distributed.launch"}
LAUNCHERS |= {"accelerate", "accelerate.commands.launch"}
RUNNERS = {"deepspeed", "ds", "deepspeed.launcher.runner", "gpt2ds", "cli.py"}

# Set by `gpt2ds train --gpus`: its own pid and start, for a rank that looks for it only when it is gone already.
SUPERVISOR_VARIABLE = "GPT2DS_SUPERVISOR"

# Who takes over orphans; in a container it may be anything, under the pid 1.
ADOPTERS = {"systemd", "init", "tini", "docker-init", "dumb-init"}

# Only these launchers set them (deepspeed/constants.py; torch/distributed/elastic).
LAUNCHED_VARIABLES = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")


def supervisor_variable() -> dict[str, str]:
    """What the ranks' environment says of this process, their supervisor."""
    return {SUPERVISOR_VARIABLE: f"{os.getpid()} {start_ticks(os.getpid())}"}


class Supervisors:
    """Those above this process, as they were when this was made."""

    def __init__(self) -> None:
        own = os.getpid()
        named = [(pid, program(pid)) for pid in ancestors(own)]
        self.launcher = next((f"{pid} {start_ticks(pid)}" for pid, name in named if name in LAUNCHERS), "")
        """The nearest launcher by pid and start, the same for all ranks that it started; "" without one."""
        self._watched = {pid: start_ticks(pid) for pid, name in named if name in LAUNCHERS | RUNNERS}
        launched = any(name in os.environ for name in LAUNCHED_VARIABLES)
        # Not where a pid namespace hides the launcher, or it is one of another name.
        orphan = bool(named) and (named[0][0] == 1 or named[0][1] in ADOPTERS)
        self._gone_before = launched and not self.launcher and orphan
        if words := os.environ.get(SUPERVISOR_VARIABLE, "").split():
            self._watched[int(words[0])] = int(words[1]) if words[1].isdigit() else None
        if start_ticks(own) is None:  # no /proc: nothing can be known
            self._watched, self._gone_before = {}, False

    def one_is_gone(self) -> bool:
        """Whether one of them has ended, or had before this process could see it."""
        return self._gone_before or any(start_ticks(pid) != start for pid, start in self._watched.items())
