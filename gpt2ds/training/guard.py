"""What can end a run from outside: signals, a launcher that is gone, the clock. Sets flags; the loop acts on them
together. Imports nothing heavy, so that signals are caught from the first moment on.
"""

import os
import signal
import threading
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# In place of a signal's number: the launcher has died, which no signal tells.
LAUNCHER_GONE = 1000

# One request can arrive twice: a signal to all processes of a job reaches a rank directly and through its launcher, and
# a terminal that closes sends its own after the shell's. Only what comes later is a second one.
REPEAT_SECONDS = 1.0

# What a run that is told to leave at once may take for its last words.
LEAVE_SECONDS = 3.0

# What schedulers grant between SIGTERM and SIGKILL, where nobody asked for more (Slurm's KillWait).
GRACE_SECONDS = 30.0


def name_of(received: int) -> str:
    """What ended a run, for the log."""
    return "the launcher is gone" if received == LAUNCHER_GONE else f"interrupted by {signal.Signals(received).name}"


class Repeats:
    """Tells a user who insists from one request that arrives twice."""

    def __init__(self) -> None:
        self._first: dict[int, float] = {}

    def insists(self, number: int) -> bool:
        """Notes a signal; whether it is one that came before, and not just now."""
        now = time.monotonic()
        return now - self._first.setdefault(number, now) >= REPEAT_SECONDS


class StopSignals:
    """While active, SIGINT, SIGTERM and SIGHUP ask for a stop and SIGUSR1 for a checkpoint; a second SIGINT leaves at
    once.

    The launcher signals its ranks one after the other, so a handler must not talk to other ranks: the loop exchanges
    the flags at the next micro-batch, and all ranks stop at the same one. A SIGHUP that nohup has switched off stays
    so.
    """

    def __init__(self) -> None:
        self.received: int = 0
        self.save_wanted = False
        self._repeats = Repeats()
        self._earlier: dict[int, object] = {}
        self._heard = -1

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python gives signals to the main thread only
        for number in (*STOP_SIGNALS, signal.SIGUSR1):
            earlier = signal.getsignal(number)
            if number == signal.SIGHUP and earlier == signal.SIG_IGN:
                continue
            self._earlier[number] = earlier
            signal.signal(number, self._receive)
        reading, self._heard = os.pipe()
        os.set_blocking(self._heard, False)
        signal.set_wakeup_fd(self._heard, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(reading,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._heard >= 0:
            signal.set_wakeup_fd(-1)
            os.close(self._heard)  # ends the thread
            self._heard = -1

    def _hear(self, reading: int) -> None:
        """Leaves at the second Ctrl-C where the main thread cannot: in a collective that waits for ever Python calls no
        handler, but the number of each signal is written into the pipe all the same.
        """
        repeats = Repeats()
        while numbers := os.read(reading, 64):
            if signal.SIGINT in numbers and repeats.insists(signal.SIGINT):
                time.sleep(LEAVE_SECONDS)
                os._exit(128 + signal.SIGINT)
        os.close(reading)

    def launcher_gone(self) -> None:
        """From the thread that watches it."""
        self.received = self.received or LAUNCHER_GONE

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save_wanted = True
            return
        if self._repeats.insists(number) and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number


class Clock:
    """Training time over all sessions of a run, in seconds."""

    def __init__(self, earlier_seconds: float = 0.0) -> None:
        self.earlier_seconds = earlier_seconds
        self._start = time.monotonic()

    @property
    def elapsed_seconds(self) -> float:
        """Seconds of this session and the earlier ones."""
        return self.earlier_seconds + time.monotonic() - self._start
