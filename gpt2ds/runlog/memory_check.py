"""Predicted beside measured, as it stands in the record of kind "memory" and as every view words it."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from gpt2ds.runlog.metrics import gib

# Beyond this the prediction is wrong, and its makers want to know. The best published error on several GPUs is 3.0%
# (LLMem, arXiv 2404.10933).
MOST_DIFFERENCE = 0.03


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryCheck:
    """One session's memory, in bytes, a number for each rank, over its steps from the second on."""

    predicted_bytes: int
    """For the worst rank."""
    measured_bytes: list[int]
    """Peaks: allocated bytes on CUDA, live tensors on a CPU."""
    reserved_bytes: list[int] | None
    """Peaks of what CUDA's caching allocator held; None on a CPU."""
    outside_bytes: list[int]
    """Peaks outside of the steps: building the engine, evaluations, samples, checkpoints."""
    steps: int
    """How many were measured."""

    @classmethod
    def of(cls, record: dict[str, Any]) -> "MemoryCheck | None":
        """What a record of kind "memory" says; None where it was not written by this program."""
        try:
            return cls(**{field.name: record[field.name] for field in fields(cls)})
        except KeyError:
            return None

    def to_dict(self) -> dict[str, Any]:
        """The fields of the record."""
        return asdict(self)

    @property
    def worst_rank(self) -> int:
        """The one that held most."""
        return self.measured_bytes.index(max(self.measured_bytes))

    @property
    def difference(self) -> float:
        """Of the worst rank's peak from the prediction, as a share of the prediction."""
        return max(self.measured_bytes) / self.predicted_bytes - 1

    def line(self) -> str:
        """In one line, for a console."""
        reserved = f" | reserved {gib(max(self.reserved_bytes))}" if self.reserved_bytes else ""
        return f"predicted {gib(self.predicted_bytes)} | measured {self._measured()} ({self.difference:+.1%}){reserved}"

    def incident(self) -> str | None:
        """What to tell the user when the prediction was wrong; None when it was not."""
        if abs(self.difference) <= MOST_DIFFERENCE:
            return None
        return (
            f"The predicted memory of {gib(self.predicted_bytes)} and the measured {self._measured()} differ by "
            f"{self.difference:+.1%}: please report this to the maintainers of gpt2ds, with plan.json, ds_config.json "
            "and metrics.jsonl from the run folder."
        )

    def _measured(self) -> str:
        peak = gib(max(self.measured_bytes))
        return f"{peak} on rank {self.worst_rank}" if len(self.measured_bytes) > 1 else peak
