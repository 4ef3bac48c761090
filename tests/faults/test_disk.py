"""Disks that fill up, become read-only or fail under a real run: what was there stays, the run goes on as
long as its log can be written, and ends with a sentence when it cannot.
"""

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.disks import FailingDisk, SmallDisk, can_mount, pages, quietly
from faults.faults_support import FaultyRun
from support import run_cli
from training.made_run import make_run

from gpt2ds.files import write_atomically
from gpt2ds.runlog.metrics import RunLog, read_records
from gpt2ds.runlog.report import write_report
from gpt2ds.training.manifest import verify

FULL, READ_ONLY = "No space left on device", "Read-only file system"


@pytest.fixture(scope="module", autouse=True)
def _mounting(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not can_mount(tmp_path_factory.mktemp("probe")):
        pytest.skip("mounting needs root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], SmallDisk]]:
    """Makes a small disk at a path below the test's folder."""
    made: list[SmallDisk] = []

    def make(at: str) -> SmallDisk:
        made.append(SmallDisk(tmp_path / at))
        return made[-1]

    yield make
    for each in reversed(made):
        quietly(each.unmount)


@pytest.fixture
def tiny(tmp_path: Path, models_file: Path, corpus_folder: Path) -> Callable[..., FaultyRun]:
    """Starts a run of a small model; its checkpoints come when it is asked for them."""

    def start(folder: Path = tmp_path, **options: Any) -> FaultyRun:
        # Steps of some 20 ms, so that what happens between two of them is seen soon.
        settings = {"model": "tiny", "accumulation": 8, "keep": 1, "ds": "zero2", "out": tmp_path / "logs"}
        run = FaultyRun(folder, models_file, corpus_folder, **settings | options)
        run.run = tmp_path / "logs" / "a"
        return run

    return start


def saves(run: FaultyRun, kind: str = "checkpoint") -> dict[str, Any]:
    """Asks for a checkpoint; the record that it was written, or of the incident."""
    earlier = len(run.records(kind))
    ranks = run.ranks()
    run.signal(signal.SIGUSR1)
    run.until(lambda: len(run.records(kind)) > earlier, 30)
    record = run.records(kind)[-1]
    assert run.ranks() == ranks
    return record


def all_hold(run: Path) -> list[str]:
    """The checkpoints, each of which must be whole, and nothing else beside them."""
    found = sorted((run / "checkpoints").iterdir())
    for path in found:
        assert verify(path).position.step == int(path.name[5:])
        assert len(list(path.iterdir())) == len(verify(path).files) + 1
    return [path.name for path in found]


def cannot_save(run: FaultyRun, why: str) -> None:
    """The next checkpoint fails: the log says so, the one before holds, training goes on."""
    earlier = all_hold(run.run)
    incident = saves(run, "incident")
    step = incident["step"]
    assert incident["what"].startswith(f"The checkpoint of step {step} could not be written: {why}. "), incident
    assert all_hold(run.run) == earlier
    run.until_step()


def half_written(run: Path) -> list[Path]:
    """What the next start would not clear away."""
    return [path for path in run.rglob("*.writing") if path.parent.name != ".ranks"]


def test_a_checkpoint_that_cannot_be_written_costs_nothing_but_itself(
    tmp_path: Path, disk: Callable[[str], SmallDisk], tiny: Callable[..., FaultyRun]
) -> None:
    logs, room = disk("logs"), disk("logs/a/checkpoints")
    with tiny(ranks=2) as run:
        run.until_step()
        name = saves(run)["name"]
        files = {file: described["bytes"] for file, described in verify(room.folder / name).files.items()}
        weights = files.pop("model.safetensors")
        assert len(files) == 2
        of_states = pages(*files.values())
        full_at: dict[str, dict[str, int]] = {
            "the folder": {"files": 0},
            "the first file": {"files": 1},
            "the states": {"room_bytes": of_states // 2},
            "the weights": {"room_bytes": of_states + weights // 2},
            "the manifest": {"room_bytes": of_states + pages(weights)},
        }
        for left in full_at.values():
            room.leave(**left)
            cannot_save(run, FULL)
            room.leave()
        name = saves(run)["name"]
        assert all_hold(run.run) == [name], "there is room again, and the one before went when this one held"

        room.read_only()
        cannot_save(run, READ_ONLY)
        room.writable()
        saves(run)
        assert len(run.records("incident")) == len(full_at) + 1

        logs.leave(0)
        assert run.end(60) == 1
        (name,) = all_hold(run.run)
        assert f"failed: the log cannot be written ({FULL}) at step {int(name[5:]):,}. " in run.output
        assert f"The run folder cannot be written ({FULL}): gpt2ds report a writes its log." in run.output
        assert "Resume with: gpt2ds train --name a --resume --gpus 2" in run.output
        assert "Traceback" not in run.output
        assert not (run.run / "training_log.md").exists() and not half_written(run.run)

        logs.leave()
        log = write_report(run.run).read_text(encoding="utf-8")
        for incident in run.records("incident"):
            assert incident["what"] in log


def test_a_disk_that_is_full_of_everything_ends_the_run_in_good_order(
    tmp_path: Path, disk: Callable[[str], SmallDisk], tiny: Callable[..., FaultyRun]
) -> None:
    """What the run prints goes to the same disk."""
    everything = disk("logs")
    with tiny(folder=everything.folder, ranks=2) as run:
        run.until_step()
        name = saves(run)["name"]
        everything.leave(0)
        assert run.end(60) == 1
        assert "Traceback" not in run.output
        assert all_hold(run.run) == [name]
        records = read_records(run.run / "metrics.jsonl")
        assert [record["step"] for record in records if record["kind"] == "step"][-1] > int(name[5:])
        assert not half_written(run.run)

        everything.leave()
        steps = int(name[5:]) + 2
        result = run_cli("train", "--resume", "--steps", steps, "--out", everything.folder, cwd=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
        assert run.records("start")[-1]["resumed_from"] == name
        assert [record["step"] for record in run.records("step")][-2:] == [steps - 1, steps]
        assert all_hold(run.run) == [f"step-{steps:08d}"]


@pytest.mark.parametrize("full", ["metrics.jsonl", "plan.json"])
def test_a_disk_that_fills_up_while_a_run_starts(
    tmp_path: Path, disk: Callable[[str], SmallDisk], tiny: Callable[..., FaultyRun], full: str
) -> None:
    logs = disk("logs")
    if full == "metrics.jsonl":
        logs.leave(files=2)  # the run's folder and its lock
    with tiny(**({"ranks": 1} if full == "metrics.jsonl" else {"gpus": 2})) as run:
        if full == "plan.json":
            run.until((run.run / "metrics.jsonl").exists, 60)
            logs.leave(0)
        assert run.end(60) == 2
        assert run.output.count(f"Error: The run folder {run.run} cannot be written ({FULL}): ") == 1, run.output
        assert "Traceback" not in run.output
        assert not (run.run / "plan.json").exists(), "else the same start would be refused once there is room"
        assert not half_written(run.run)


def test_a_disk_that_fails_under_a_run_is_read_only_from_then_on(
    tmp_path: Path, tiny: Callable[..., FaultyRun]
) -> None:
    try:
        failing = FailingDisk(tmp_path / "logs", tmp_path / "image")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop devices here: {error}")
    try:
        with tiny(ranks=1) as run:
            run.until_step()
            name = saves(run)["name"]
            try:
                failing.fail()
            except OSError as error:
                pytest.skip(f"this kernel fails no file system on demand: {error}")
            assert run.end(60) == 1
            why = f"the log cannot be written ({READ_ONLY}), but the last checkpoint could not be written"
            assert f"failed: {why} at step " in run.output
            assert f"The run folder cannot be written ({READ_ONLY})" in run.output
            assert "Traceback" not in run.output
            assert all_hold(run.run) == [name]
        failing.unmount()
        failing.mount()
        assert all_hold(run.run) == [name]
        kinds = [record["kind"] for record in read_records(run.run / "metrics.jsonl")]
        assert "checkpoint" in kinds and kinds.index("step") < kinds.index("checkpoint"), "as old as the checkpoint"
    finally:
        quietly(failing.unmount)


# The single writers, without a run around them.


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_training_log_is_the_old_one_or_the_new_one(
    disk: Callable[[str], SmallDisk], models_file: Path, corpus_folder: Path
) -> None:
    """Also each picture, wherever the disk is full."""
    room = disk("logs")
    run = make_run(room.folder, models_file, corpus_folder)
    write_report(run)
    old = contents(run)
    with RunLog(run) as log:
        for step in range(5, 8):
            log.record("step", step, loss=10.0, lr=1e-3, grad_norm=1.0, tokens=step * 100, tokens_per_second=9.0)
            log.record("evaluation", step, val_loss=10.0 - step, windows=4, seconds=0.1)
    whole = sum(pages(len(content)) for name, content in old.items() if name.endswith(("png", "md")))
    ends = set()
    for room_bytes in (0, whole // 4, None):
        room.leave() if room_bytes is None else room.leave(room_bytes)
        try:
            write_report(run)
        except OSError as error:
            assert error.strerror == FULL
            ends.add("full")
        else:
            ends.add("written")
        now = contents(run)
        assert now.keys() == old.keys(), "nothing half written stays"
        for name, content in now.items():
            assert not name.endswith("png") or (content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82"))
        assert now["training_log.md"] == old["training_log.md"] or b"| 7 |" in now["training_log.md"]
    assert ends == {"full", "written"}
    assert now["training_log.md"] != old["training_log.md"]


@pytest.mark.parametrize("why", [FULL, READ_ONLY])
def test_a_small_file_is_the_old_one_or_the_new_one(disk: Callable[[str], SmallDisk], why: str) -> None:
    """outcome.json, plan.json, ds_config.json and manifest.json are written by this function."""
    room = disk("small")
    path = room.folder / "outcome.json"
    write_atomically(path, b"old")
    room.leave(0) if why == FULL else room.read_only()
    with pytest.raises(OSError, match=why):
        write_atomically(path, b"new")
    assert contents(room.folder) == {"outcome.json": b"old"}
    room.leave() if why == FULL else room.writable()
    write_atomically(path, b"new")
    assert contents(room.folder) == {"outcome.json": b"new"}


def test_a_log_on_a_full_disk_keeps_its_whole_lines(disk: Callable[[str], SmallDisk]) -> None:
    room = disk("small")
    log = RunLog(room.folder)
    log.record("step", 1, loss=1.0)
    room.leave(0)
    written = 1
    with pytest.raises(OSError, match=FULL):
        for written in range(2, 1000):
            log.record("step", written, loss=1.0)
    with pytest.raises(OSError, match=FULL):
        log.close()
    steps = [record["step"] for record in read_records(log.path)]
    assert steps == list(range(1, written))
    assert not log.path.read_bytes().endswith(b"\n"), "the line on which the disk filled up is torn"
    room.leave()
    with RunLog(room.folder) as log:
        log.record("step", 9999, loss=1.0)
    assert [record["step"] for record in read_records(log.path)] == [*steps, 9999]
