"""What the ranks tell each other after a step, in one exchange, so that all of them see the same and act alike."""

import math
import statistics
from dataclasses import astuple, dataclass

import torch

from gpt2ds.training.engine import gather_numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStep:
    """One rank's part of a step. Flags are numbers here, as everything that is exchanged."""

    loss: float
    stop: float
    """The signal that asks for a stop, or 0."""
    in_use_bytes: float
    reserved_bytes: float
    """-1 where nothing is reserved, as on a CPU."""
    watched_bytes: float
    outside_bytes: float
    time_used: float
    """Share of --hours that is gone."""
    save_due: float
    log_lost: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSeen:
    """A step as all ranks see it."""

    ranks: tuple[RankStep, ...]
    taken: bool
    """Whether the optimizer stepped; DeepSpeed has agreed on it already."""

    @property
    def loss(self) -> float:
        """Over the global batch."""
        return statistics.fmean(rank.loss for rank in self.ranks)

    @property
    def stop(self) -> int:
        return int(max(rank.stop for rank in self.ranks))

    @property
    def save_due(self) -> bool:
        return any(rank.save_due for rank in self.ranks)

    @property
    def time_used(self) -> float:
        """By rank 0's clock."""
        return self.ranks[0].time_used

    @property
    def log_lost(self) -> bool:
        """Only rank 0 writes one."""
        return bool(self.ranks[0].log_lost)

    @property
    def reserved_bytes(self) -> list[int] | None:
        """Of each rank; None on a CPU."""
        sizes = self.sizes("reserved_bytes")
        return None if min(sizes) < 0 else sizes

    def sizes(self, name: str) -> list[int]:
        """A number of bytes of each rank."""
        return [int(getattr(rank, name)) for rank in self.ranks]

    def why_left_out(self) -> str:
        """For a step that was not taken."""
        culprits = [str(rank) for rank, step in enumerate(self.ranks) if not math.isfinite(step.loss)]
        return f"the loss of rank {', '.join(culprits)} was not finite" if culprits else "a gradient was not finite"


def agree_on(own: RankStep, *, taken: bool, device: torch.device) -> StepSeen:
    """Every rank's part on every rank; called by all together."""
    rows = gather_numbers([float(value) for value in astuple(own)], device)
    names = RankStep.__dataclass_fields__
    return StepSeen(ranks=tuple(RankStep(**dict(zip(names, row, strict=True))) for row in rows), taken=taken)
