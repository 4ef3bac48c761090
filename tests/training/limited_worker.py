"""`gpt2ds` in a process that can take only so many more MiB than it has once DeepSpeed is loaded.

Arguments: MiB, then the command line.
"""

import resource
import sys
from pathlib import Path

import deepspeed  # noqa: F401
import torch

from gpt2ds.cli import main

if __name__ == "__main__":
    more = int(sys.argv.pop(1)) * 2**20
    torch.randn(64, 64) @ torch.randn(64, 64)  # the libraries' own buffers
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))
    main()
