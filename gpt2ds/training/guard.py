"""What can end a run early: signals, the clock, and steps that stay non-finite. Sets flags; the loop acts on them
together.
"""

import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# So many steps in a row without a finite gradient are no accident of one batch.
NON_FINITE_STEPS_MOST = 25


class StopSignals:
    """While active, SIGINT and SIGTERM only set a flag; a second SIGINT leaves at once.

    The launcher signals its ranks one after the other, so a handler must not talk to other ranks: the loop exchanges
    the flag at the next step and all ranks stop at the same one.
    """

    def __init__(self) -> None:
        self.received: int = 0
        self._earlier: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            self._earlier[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = self.received or number


class Clock:
    """Training time over all sessions of a run, in seconds."""

    def __init__(self, earlier_seconds: float = 0.0) -> None:
        self._earlier = earlier_seconds
        self._start = time.monotonic()

    @property
    def elapsed_seconds(self) -> float:
        """Seconds of this session and the earlier ones."""
        return self._earlier + time.monotonic() - self._start


class Finiteness:
    """Counts steps that were left out because a gradient was not finite."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def saw(self, taken: bool) -> bool:
        """Notes one step; False when too many in a row were left out for the run to make sense."""
        self.in_a_row = 0 if taken else self.in_a_row + 1
        return self.in_a_row < NON_FINITE_STEPS_MOST
