"""Which settings memory_accuracy.py measures, and in which order: the most informative first."""

import functools
import itertools
import math
from dataclasses import dataclass, replace

from gpt2ds.ds_profile import load_profile, shipped_profiles
from gpt2ds.estimate.rows import memory_setting
from gpt2ds.gpt2.config import MODELS
from gpt2ds.gpt2.policies import POLICIES
from gpt2ds.memory.fit import largest_micro_batch
from gpt2ds.memory.formula import Estimate, predict
from gpt2ds.memory.setting import MemorySetting
from gpt2ds.options import TrainOptions

SIZES = ("gpt2_small", "gpt2_medium", "gpt2_large", "gpt2_xl")
ACCUMULATION = 2

profile_of = functools.cache(load_profile)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One run of the grid."""

    model: str
    profile: str
    recompute: str
    micro_batch: int
    role: str = "grid"
    """"largest": predicted to be the largest micro-batch that fits; "beyond": 1.1 times that; "grid"."""

    @property
    def key(self) -> str:
        """What tells the settings apart in the results."""
        return f"{self.model} {self.profile} {self.recompute} {self.micro_batch}"

    def memory(self, ranks: int) -> MemorySetting:
        """As the formula takes it."""
        return memory_setting(
            TrainOptions(recompute=self.recompute),
            profile_of(self.profile),
            MODELS[self.model],
            ranks=ranks,
            micro_batch=self.micro_batch,
            accumulation=ACCUMULATION,
        )

    def predicted(self, ranks: int) -> Estimate:
        """The formula's peak."""
        return predict(self.memory(ranks))


def settings(room_bytes: int, ranks: int) -> list[Setting]:
    """The whole grid, the most informative first; only what is predicted to fit, but for those "beyond"."""
    # A setting that belongs to two lists keeps its place in the first.
    found: dict[str, Setting] = {}
    limits = [
        line for name in (path.stem for path in shipped_profiles()) for line in limit_line(name, room_bytes, ranks)
    ]
    for setting in (*limits, *(beyond(line) for line in limits)):
        found.setdefault(setting.key, setting)
    for setting in by_news(grid(room_bytes, ranks)):
        found.setdefault(setting.key, setting)
    return list(found.values())


def limit_line(profile: str, room_bytes: int, ranks: int) -> list[Setting]:
    """The profile as shipped at its largest micro-batch: with the model in its name, else the largest that fits."""
    named = [model for model in SIZES if profile.startswith(model)]
    for model in named or ("gpt2_large", "gpt2_medium", "gpt2_small"):
        setting = Setting(model=model, profile=profile, recompute=profile_of(profile).recompute, micro_batch=1)
        if most := largest_micro_batch(setting.memory(ranks), room_bytes):
            return [replace(setting, micro_batch=most, role="largest")]
    return []


def beyond(largest: Setting) -> Setting:
    """1.1 times the micro-batch, at least one sequence more."""
    return replace(largest, micro_batch=math.ceil(1.1 * largest.micro_batch), role="beyond")


def grid(room_bytes: int, ranks: int) -> list[Setting]:
    """All sizes x the profiles made for any size x all policies, at a small, a middling and the largest micro-batch."""
    profiles = [path.stem for path in shipped_profiles() if not path.stem.startswith(SIZES)]
    found = []
    for model, profile, recompute in itertools.product(SIZES, profiles, POLICIES):
        setting = Setting(model=model, profile=profile, recompute=recompute, micro_batch=1)
        most = largest_micro_batch(setting.memory(ranks), room_bytes)
        sizes = sorted({size for size in (most // 4, most // 2, most) if size})
        found += [replace(setting, micro_batch=size) for size in sizes]
    return found


def by_news(candidates: list[Setting]) -> list[Setting]:
    """Each setting brings the most pairs (size and profile, profile and policy, ...) that were not there before."""

    def pairs(setting: Setting) -> set[tuple[str, str]]:
        full = "large" if setting.micro_batch > 8 else "small"
        return set(itertools.combinations((setting.model, setting.profile, setting.recompute, full), 2))

    left, ordered, seen = list(candidates), [], set[tuple[str, str]]()
    while left:
        best = max(left, key=lambda setting: len(pairs(setting) - seen))
        if pairs(best) <= seen:  # everything has been seen: again from the start
            seen.clear()
        left.remove(best)
        ordered.append(best)
        seen |= pairs(best)
    return ordered
