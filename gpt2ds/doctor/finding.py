"""What one check of `gpt2ds doctor` found: fine, worth knowing, or in the way of a run, and what to do about it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the doctor's answer. A warning does not stop a run, a problem does."""

    check: str
    level: Literal["ok", "warning", "problem"]
    found: str
    fix: str = ""


def ok(check: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(check=check, level="ok", found=found)


def warning(check: str, found: str, fix: str) -> Finding:
    """A run would start; this may cost it something later."""
    return Finding(check=check, level="warning", found=found, fix=fix)


def problem(check: str, found: str, fix: str) -> Finding:
    """A run would not start, or not end well."""
    return Finding(check=check, level="problem", found=found, fix=fix)


def from_sentence(check: str, sentence: str) -> Finding:
    """A problem told as our errors tell it: what is wrong, a colon, what to do."""
    found, _, fix = sentence.rpartition(": ")
    return problem(check, found or fix, fix if found else "")
