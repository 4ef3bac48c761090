"""An interrupted prepare goes on where it was, whenever it was stopped, and leaves no process behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpt2ds.corpus import prepare as prepare_module
from gpt2ds.corpus import units
from gpt2ds.corpus.prepare import PrepareOptions, Progress, prepare
from gpt2ds.corpus.shards import open_corpus
from gpt2ds.errors import UserError

TOPICS = Path(sysconfig.get_paths()["stdlib"], "pydoc_data", "topics.py")
OPTIONS = PrepareOptions(name="c", processes=1, shard_tokens=9000, validation_fraction=0.1)

# Stops itself after `units` units, by a signal; prints its worker processes first.
PROGRAM = """
import os, signal, sys, psutil
from pathlib import Path
from gpt2ds.corpus import prepare, units
from gpt2ds.corpus.prepare import PrepareOptions
units.UNIT_BYTES, prepare.JOURNAL_SECONDS = 10_000, 0.0
stop_at, how = int(sys.argv[1]), int(sys.argv[2])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it from the start
calls = 0
def progress(done, total, tokens):
    global calls
    calls += 1
    if calls > stop_at:
        print(*(child.pid for child in psutil.Process().children()), flush=True)
        os.kill(os.getpid(), how)
prepare.prepare(["text.txt"], Path("out"), progress=progress,
                options=PrepareOptions(name="c", processes=2, shard_tokens=9000, validation_fraction=0.1))
"""


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(units, "UNIT_BYTES", 10_000)
    monkeypatch.setattr(prepare_module, "JOURNAL_SECONDS", 0.0)
    path = tmp_path / "text.txt"
    path.write_text(TOPICS.read_text(encoding="utf-8")[:200_000], encoding="utf-8")
    return path


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("stop_at", "how"), [(0, signal.SIGKILL), (8, signal.SIGKILL), (14, signal.SIGTERM), (11, signal.SIGINT)]
)
def test_killed_and_started_again(text: Path, stop_at: int, how: int) -> None:
    whole = prepare(["text.txt"], Path("whole"), options=OPTIONS)
    printed, failure = Path("printed"), Path("failure")  # files: an orphan would hold a pipe open for ever
    with printed.open("wb") as stdout, failure.open("wb") as stderr:
        command = [sys.executable, "-c", PROGRAM, str(stop_at), str(how)]
        done = subprocess.run(command, stdout=stdout, stderr=stderr, check=False, timeout=60)
    assert done.returncode == -how, failure.read_text()
    workers = [int(pid) for pid in printed.read_text().split()]
    assert len(workers) >= 2  # and the resource tracker of multiprocessing
    deadline = time.monotonic() + 5
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    orphans = [pid for pid in workers if alive(pid)]
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    assert not orphans, "workers outlived their parent"
    with pytest.raises(UserError, match="interrupted; give the same command again"):
        open_corpus(Path("out"))

    seen: list[tuple[int, int, int]] = []
    notes: list[str] = []
    resumed = prepare(
        ["text.txt"], Path("out"), options=OPTIONS, progress=lambda *now: seen.append(now), note=notes.append
    )
    assert resumed.digest == whole.digest
    assert content_of(Path("out")) == content_of(Path("whole"))
    assert (seen[0][0] > 0) == (stop_at > 0)
    assert not any("anew" in note for note in notes)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_any_state_that_a_kill_can_leave_is_gone_on_from(text: Path) -> None:
    """What the folder holds just before each rename and deletion is all that a kill can leave, but for bytes at the
    end of an open file."""
    watched = Path("out").absolute()
    snapshots: list[Path] = []
    watching = True

    def snapshot(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal watching
        if watching and event in ("os.rename", "os.remove") and watched in Path(arguments[0]).absolute().parents:
            watching = False
            snapshots.append(Path(f"snapshot{len(snapshots)}"))
            shutil.copytree(watched, snapshots[-1])
            watching = True

    sys.addaudithook(snapshot)
    prepare(["text.txt"], Path("out"), options=OPTIONS)
    watching = False
    expected = content_of(Path("out"))
    assert len(snapshots) > 20
    resumed = 0
    for folder in snapshots:
        seen: list[tuple[int, int, int]] = []
        notes: list[str] = []
        prepare(["text.txt"], folder, options=OPTIONS, progress=record_into(seen), note=notes.append)
        assert not any("anew" in note for note in notes)
        resumed += bool(seen) and seen[0][0] > 0
        left = content_of(folder)
        assert {name: left.get(name) for name in expected} == expected
        assert set(left) - set(expected) <= {"..progress.json.writing", ".corpus.json.writing"}
    assert resumed > 15


def record_into(seen: list[tuple[int, int, int]]) -> Progress:
    return lambda done, total, tokens: seen.append((done, total, tokens))


def interrupted(text: Path) -> Path:
    def stop(done: int, total: int, tokens: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(["text.txt"], Path("out"), options=OPTIONS, progress=stop)
    assert json.loads(Path("out/.progress.json").read_text())["units"] > 3
    return Path("out")


def test_other_text_starts_anew_and_says_so(text: Path) -> None:
    out = interrupted(text)
    text.write_text(TOPICS.read_text(encoding="utf-8")[100_000:150_000], encoding="utf-8")
    notes: list[str] = []
    anew = prepare(["text.txt"], out, options=OPTIONS, note=notes.append)
    assert "other text or options lies here: starting anew" in notes[0]
    assert content_of(out) == content_of(prepare(["text.txt"], Path("whole"), options=OPTIONS).folder)
    assert open_corpus(out) == anew


@pytest.mark.parametrize("damage", ["remove", "shorten", "remove finished"])
def test_lost_shards_start_anew_and_say_so(text: Path, damage: str) -> None:
    out = interrupted(text)
    if damage == "remove finished":
        next(out.glob("c_val_*.bin")).unlink()
    else:
        (partial,) = out.glob(".*.partial")
        if damage == "remove":
            partial.unlink()
        else:
            os.truncate(partial, 1030)
    notes: list[str] = []
    prepare(["text.txt"], out, options=OPTIONS, note=notes.append)
    assert "not all there: starting anew" in notes[0]
    assert content_of(out) == content_of(prepare(["text.txt"], Path("whole"), options=OPTIONS).folder)


def test_a_damaged_journal_starts_anew(text: Path) -> None:
    out = interrupted(text)
    journal = json.loads((out / ".progress.json").read_text())
    for content in (json.dumps({**journal, "writer": None}), json.dumps({"fingerprint": journal["fingerprint"]})):
        (out / ".progress.json").write_text(content)
        prepare(["text.txt"], out, options=OPTIONS)
        assert content_of(out) == content_of(prepare(["text.txt"], Path("whole"), options=OPTIONS).folder)
        (out / "corpus.json").unlink()
