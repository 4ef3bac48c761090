"""A process that runs command after command, and what every refusal must look like."""

import copy
import json
import os
import re
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import cpu_environment

WORKER = Path(__file__).with_name("bad_input_worker.py")
ANSWER_SECONDS = 90
REMOVED = object()
TRAIN = ["train", "--ds", "fp32_baseline", "--model", "small"]
LONGEST_MESSAGE = 4000
# What a person who wrote no Python cannot read: exception and class names, addresses, codes of the operating system.
PROGRAMMERS_WORDS = re.compile(
    r"\b(?!UserError)[A-Z]\w+(Error|Exception)\b|object at 0x|<class |Errno|\bNoneType\b|__\w+__"
)


class Cases:
    """Runs commands that must be refused, and counts the different ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: set[str] = set()
        self._number = 0
        self._process: subprocess.Popen[str] | None = None

    def fresh(self) -> Path:
        """An empty folder for the next case."""
        self._number += 1
        folder = self.folder / f"{self._number:04d}"
        folder.mkdir()
        return folder

    def run(self, arguments: list[Any], folder: Path) -> dict[str, Any]:
        """How the command ended, run in that folder."""
        words = [str(argument) for argument in arguments]
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([words, str(folder)]) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], ANSWER_SECONDS)
        line = process.stdout.readline() if ready else ""
        if not line:
            self.close()
            raise AssertionError(f"{'it died' if ready else 'it hangs'}: gpt2ds {words} in {folder}")
        answer: dict[str, Any] = json.loads(line)
        assert answer["crash"] is None, f"gpt2ds {words} in {folder}:\n{answer['crash']}"
        assert not answer["changed"], f"gpt2ds {words} changed {answer['changed']}"
        assert not answer["outside"], f"gpt2ds {words} wrote outside of its folder: {answer['outside']}"
        return answer

    def refused(self, arguments: list[Any], folder: Path, *, what: str = "", code: int = 2) -> str:
        """Runs it, demands a refusal in one readable message, and returns that. what: tells apart equal commands."""
        answer = self.run(arguments, folder)
        shown = f"gpt2ds {arguments} in {folder} {what}\n{answer['out']}{answer['err']}"
        assert answer["code"] == code, f"exit code {answer['code']}: {shown}"
        problem = unreadable(answer["err"])
        assert problem is None, f"{problem}: {shown}"
        self.seen.add(json.dumps([[str(argument) for argument in arguments], what]))
        return str(answer["err"])

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None:
            settings = self.folder / "settings"
            settings.mkdir(exist_ok=True)
            more = {"COLUMNS": "160", "TERM": "dumb", "PYTHONDONTWRITEBYTECODE": "1", "MPLCONFIGDIR": str(settings)}
            more |= {"HOME": str(settings), "TMPDIR": str(settings), "PYTHONFAULTHANDLER": "1"}
            environment = cpu_environment(**more)
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                environment.pop(name, None)
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=self.folder,
            )
        return self._process


def unreadable(text: str) -> str | None:
    """What is wrong with a refusal, or None: one message, in words, short, without control characters."""
    if not text.strip():
        return "no message"
    if "Traceback" in text:
        return "a traceback"
    if len(re.findall(r"^Errors?:|─ Error ─", text, flags=re.MULTILINE)) != 1:
        return "not one message"
    # What was said of a damaged checkpoint before it may name the damage as Python does.
    if found := PROGRAMMERS_WORDS.search(text, text.find("Error")):
        return f"a programmer's word, {found[0]!r}"
    if len(text) > LONGEST_MESSAGE:
        return f"{len(text):,} characters"
    if odd := [char for char in text if not char.isprintable() and char != "\n"]:
        return f"control characters, {odd[:3]!r}"
    return None


def link_tree(source: Path, target: Path) -> Path:
    """A copy of a folder that shares the bytes of its files; what is to be changed is unlinked first by `put`."""
    for path in sorted(source.rglob("*")):
        other = target / path.relative_to(source)
        other.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            other.mkdir(exist_ok=True)
        else:
            os.link(path, other)
    return target


def put(path: Path, content: Any) -> None:
    """Replaces a file (bytes, text, or what JSON holds) without touching what shares its bytes."""
    path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def changed(content: Any, at: str, value: Any) -> Any:
    """A copy with the value at a dotted place replaced or removed; in a key ~ stands for a dot."""
    whole = inner = copy.deepcopy(content)
    *way, last = [int(key) if key.isdigit() else key.replace("~", ".") for key in at.split(".")]
    for key in way:
        inner = inner[key]
    if value is REMOVED:
        del inner[last]
    else:
        inner[last] = value
    return whole
