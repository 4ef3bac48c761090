"""One rank's vigil without any training: `vigil_worker.py FOLDER RANK TIMEOUT SECONDS WHAT` moves for so long, then
does WHAT. Prints what its vigil says.
"""

import os
import signal
import sys
import time
from pathlib import Path

from gpt2ds.training.vigil import Vigil


def main() -> None:
    """See the module's docstring."""
    folder, rank, timeout, seconds, what = sys.argv[1:]
    gone: list[float] = []
    with Vigil(
        Path(folder),
        int(rank),
        2,
        timeout_seconds=float(timeout),
        on_launcher_gone=lambda: gone.append(time.monotonic()),
        on_lost=lambda message, speaks: print("lost:", message, flush=True),
        grace_seconds=0.5,
    ) as vigil:
        print("entered", flush=True)
        end = time.monotonic() + float(seconds)
        while time.monotonic() < end and not gone:
            time.sleep(0.02)
            vigil.progress(17, "in step 18")
        if gone:
            print("launcher gone", flush=True)
        if what == "behind":
            vigil.progress(17, "in step 18")
        if what == "kill":
            # What it says of itself may be a second old, and more on a busy machine.
            while '"step": 17' not in (Path(folder) / ".ranks" / f"rank-{int(rank):05d}.json").read_text("utf-8"):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "fail":
            raise ValueError("a mistake")
        elif what in ("hang", "behind"):
            time.sleep(60)
        elif what == "stay":  # moves, and does not leave
            while time.monotonic() < end + 60:
                time.sleep(0.02)
                vigil.progress(17, "in step 18")
        elif what == "ask":
            print("asked:", vigil.lost(), flush=True)


main()
