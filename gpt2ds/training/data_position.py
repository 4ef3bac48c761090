"""Where a run stands in its data."""

from collections import deque

# More than the steps that a run looks back over when it goes back to a checkpoint.
REMEMBERED_STEPS = 100


class DataPosition:
    """Which sequences come next: they are counted through, save for ranges on which training went wrong."""

    def __init__(self, global_batch: int, sequences_seen: int = 0, passed_over: list[list[int]] | None = None) -> None:
        self.global_batch = global_batch
        self.sequences_seen = sequences_seen
        self.passed_over = [list(span) for span in passed_over or []]
        self._starts: deque[int] = deque(maxlen=REMEMBERED_STEPS)

    def next_step(self) -> int:
        """Where the next step's sequences start."""
        start = self.sequences_seen
        # Ranges are whole steps and sorted, so one may follow upon the other.
        for first, end in self.passed_over:
            if first == start:
                start = end
        return start

    def advance(self) -> None:
        """After a step on them."""
        self._starts.append(self.next_step())
        self.sequences_seen = self._starts[-1] + self.global_batch

    def of_steps(self, count: int) -> tuple[int, int]:
        """[from, to) of the sequences of the last so many steps."""
        return self._starts[-min(count, len(self._starts))], self.sequences_seen

    def pass_over(self, first: int, end: int) -> None:
        """Leaves these out from now on, but for those that were seen already."""
        first = max(first, self.sequences_seen)
        if first < end and [first, end] not in self.passed_over:
            self.passed_over = sorted([*self.passed_over, [first, end]])
