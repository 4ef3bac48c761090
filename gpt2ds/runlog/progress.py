"""The progress bar of `gpt2ds prepare`: bytes read, tokens per second, time left; plain lines when piped."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_LINE_SECONDS = 10.0


class ByteProgress:
    """An observer of `corpus.prepare`: called with (bytes done, bytes total, tokens done) after each unit of work."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            BarColumn(),
            TaskProgressColumn(),
            DownloadColumn(binary_units=True),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("text", total=None, speed="")
        self._first: tuple[float, int] | None = None
        self._spoke_at = time.monotonic()

    def __enter__(self) -> "ByteProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, bytes_done: int, bytes_total: int, tokens_done: int) -> None:
        now = time.monotonic()
        # A resumed preparation begins with tokens that this session did not make.
        self._first = self._first or (now, tokens_done)
        seconds, tokens = now - self._first[0], tokens_done - self._first[1]
        speed = f"{tokens / seconds / 1e6:.2f}M tokens/s" if seconds > 0 and tokens else ""
        self._bar.update(self._task, completed=bytes_done, total=bytes_total, speed=speed)
        if not self._console.is_terminal and now - self._spoke_at >= PLAIN_LINE_SECONDS:
            self._spoke_at = now
            left = seconds * (bytes_total - bytes_done) / max(1, bytes_done)
            print(
                f"{bytes_done / max(1, bytes_total):4.0%}  {tokens_done:,} tokens  {speed}  {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def note(self, sentence: str) -> None:
        """Something that the user should know."""
        self._console.print(sentence, markup=False, highlight=False)


def byte_progress() -> ByteProgress:
    """A progress bar on a terminal, a line every ten seconds otherwise."""
    return ByteProgress()
