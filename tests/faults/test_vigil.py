"""What a rank's vigil sees and says, and the lock of a run folder, with small processes that do not train."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import cpu_environment, free_port

from gpt2ds import run_lock
from gpt2ds.errors import UserError
from gpt2ds.run_lock import RunLock
from gpt2ds.training.vigil import Vigil

WORKER = Path(__file__).with_name("vigil_worker.py")


def start(
    folder: Path, rank: int, seconds: float, what: str, *, port: int, timeout: float = 600
) -> subprocess.Popen[str]:
    words = [sys.executable, str(WORKER), str(folder), *map(str, (rank, timeout, seconds, what))]
    environment = cpu_environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(*processes: subprocess.Popen[str], seconds: float = 30) -> list[tuple[int, str]]:
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.parametrize(
    ("what", "timeout", "seconds", "sentence"),
    [
        ("kill", 600, 20, "is gone; its last step was 17, it was in step 18."),
        ("stop", 3, 1, "has not moved for 3 s: it was in step 18; a signal stopped it (SIGSTOP, Ctrl-Z)."),
        ("hang", 3, 2, "has not moved for 3 s: it was in step 18; `py-spy dump --pid {pid}` shows where."),
    ],
)
def test_a_rank_that_is_lost_is_named_and_the_other_one_leaves(
    tmp_path: Path, what: str, timeout: float, seconds: float, sentence: str
) -> None:
    port = free_port()
    rank = start(tmp_path, 0, seconds, "behind", port=port, timeout=timeout)
    other = start(tmp_path, 1, 1, what, port=port, timeout=timeout)
    (code, output), *_ = ended(rank, seconds=20)
    assert code == 1
    assert output == f"entered\nlost: Rank 1 (process {other.pid}) {sentence.format(pid=other.pid)}\n"
    if what == "hang":  # its own vigil comes to the same end
        assert ended(other) == [(1, output)]
    other.kill()
    other.communicate()

    # What they left behind says nothing to the next two, the second of which comes late.
    port = free_port()
    first = start(tmp_path, 0, 2.5, "end", port=port)
    time.sleep(1)
    assert ended(first, start(tmp_path, 1, 0.5, "end", port=port)) == [(0, "entered\n")] * 2
    assert not list((tmp_path / ".ranks").iterdir())


def test_ranks_that_are_all_stuck_say_so(tmp_path: Path) -> None:
    port = free_port()
    results = ended(*(start(tmp_path, rank, 0, "hang", port=port, timeout=2) for rank in (0, 1)))
    for code, output in results:
        assert code == 1
        assert "lost: No rank has moved for 2 s: all were starting; `py-spy dump --pid " in output


def test_a_main_thread_that_asks_learns_of_a_rank_that_failed_by_itself(tmp_path: Path) -> None:
    port = free_port()
    first, second = start(tmp_path, 0, 2, "ask", port=port), start(tmp_path, 1, 1, "fail", port=port)
    (code, output), (failed, _) = ended(first, second)
    assert (code, failed) == (0, 1)
    sentence = f"Rank 1 (process {second.pid}) failed: ValueError: a mistake; its last step was 17."
    assert output == f"entered\nasked: {sentence}\n"


@pytest.mark.parametrize(
    ("launcher", "what", "code"), [("torchrun", "end", 0), ("torchrun", "stay", 1), ("start", "end", 0)]
)
def test_a_launcher_that_dies_is_noticed_and_a_mere_script_is_not(
    tmp_path: Path, launcher: str, what: str, code: int
) -> None:
    (tmp_path / ".ranks").write_text("no folder: nothing can be written below")
    script = tmp_path / launcher
    script.write_text("import subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[1:]])\n")
    words = [sys.executable, str(script), str(WORKER), str(tmp_path), "0", "2", "6", what]
    parent = subprocess.Popen(words, env=cpu_environment(), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "entered\n"
    os.kill(parent.pid, signal.SIGKILL)
    start_time = time.monotonic()
    rest = parent.stdout.read()  # until the worker has ended as well
    seconds = time.monotonic() - start_time
    parent.wait()
    if launcher == "start":
        assert rest == ""
        assert seconds > 4
    elif code:
        assert rest.startswith("launcher gone\nlost: The launcher is gone, and Rank 0 (process ")
        assert "has not left within 2 s: it was in step 18." in rest
        assert seconds < 6
    else:
        assert rest == "launcher gone\n"
        assert seconds < 4


SUPERVISED = """
from gpt2ds.supervisors import Supervisors
found = Supervisors()
print(bool(found.launcher), found.one_is_gone())
"""


@pytest.mark.parametrize(
    ("first", "sees_launcher", "gone"),
    [("torchrun", True, False), ("some-launcher", False, False)],
    ids=["a launcher", "one of another name"],
)
def test_a_launcher_may_be_the_first_process_of_a_container(first: str, sees_launcher: bool, gone: bool) -> None:
    inner = ["unshare", "--pid", "--fork", "--mount-proc", "bash", "-c"]
    if subprocess.run([*inner, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a pid namespace needs root")
    # Pid 1 bears that name; between it and the rank stands a shell, but for torchrun.
    rank = f"{shlex.join([sys.executable, '-c', SUPERVISED])}; true"
    below = rank if sees_launcher else f"bash -c {shlex.quote(rank)}; true"
    command = [*inner, f"exec -a {first} bash -c {shlex.quote(below)}"]
    environment = cpu_environment(TORCHELASTIC_RUN_ID="x")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(sees_launcher), str(gone)]


def test_progress_costs_microseconds(tmp_path: Path) -> None:
    vigil = Vigil(tmp_path, 0, 1, timeout_seconds=600, on_launcher_gone=lambda: None, on_lost=lambda *_: None)
    best = 1.0
    for step in range(100):
        start_time = time.perf_counter()
        for _ in range(100):
            vigil.progress(step, "in step")
        best = min(best, (time.perf_counter() - start_time) / 100)
    assert best < 20e-6


HOLDER = """
import os, subprocess, sys, time
from pathlib import Path
from gpt2ds.run_lock import RunLock
lock = RunLock.take(Path(sys.argv[1]))
started = subprocess.Popen(["sleep", "20"], close_fds=False).pid
reading, writing = os.pipe()
if (forked := os.fork()) == 0:
    os.write(writing, b"it has closed its copy")
    time.sleep(20)
    os._exit(0)
os.read(reading, 1)
print(started, forked, flush=True)
time.sleep(20)
"""


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "a"
    words = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(words, env=cpu_environment(), stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    children = [int(word) for word in holder.stdout.readline().split()]
    with pytest.raises(UserError) as refusal:
        RunLock.take(folder)
    assert f"{folder} is in use by process {holder.pid} (since 20" in str(refusal.value)
    assert f"stop it with `kill {holder.pid}`" in str(refusal.value)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    lock = RunLock.take(folder)  # its children live, and do not keep it
    if (forked := os.fork()) == 0:
        time.sleep(20)
        os._exit(0)
    lock.release()
    RunLock.take(folder).release()
    for pid in (*children, forked):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(forked, 0)


def test_a_lock_that_another_host_may_hold_is_not_stolen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / ".lock"
    file.write_text('{"pid": 12, "start_ticks": 5, "machine": "elsewhere x y", "since": "yesterday"}')
    RunLock.take(tmp_path).release()  # the kernel of a local file system knows better
    file.write_text('{"pid": 12, "start_ticks": 5, "machine": "elsewhere x y", "since": "yesterday"}')
    monkeypatch.setattr(run_lock, "LOCAL_FILE_SYSTEMS", set())
    with pytest.raises(UserError, match=r"process 12 on elsewhere \(since yesterday\).* remove .*\.lock"):
        RunLock.take(tmp_path)
    assert "elsewhere" in file.read_text()
    host, boot, _ = run_lock.machine().split()
    file.write_text(f'{{"pid": 12, "start_ticks": 5, "machine": "{host} {boot} another-container"}}')
    RunLock.take(tmp_path).release()  # its kernel is ours, and would not have granted it
    file.write_text(f'{{"pid": 1, "start_ticks": -1, "machine": "{run_lock.machine()}"}}')  # of this one, and dead
    lock = RunLock.take(tmp_path)
    lock.release()
    RunLock.take(tmp_path).release()
