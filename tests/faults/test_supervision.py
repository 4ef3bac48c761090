"""What happens to a real run when its launcher, its ranks or its supervisor die, and what `--restarts` makes of it."""

import json
import signal
import sys
import time
from pathlib import Path

from faults.faults_support import REPOSITORY, FaultyRun, kill
from support import free_port, run_cli

from gpt2ds.training.guard import LEAVE_SECONDS


def left_in_good_order(run: FaultyRun, reason: str) -> None:
    """The last step is saved, and the log says how it ended."""
    last = run.records("step")[-1]["step"]
    assert run.saved()[-1] == f"step-{last:08d}", run.output
    assert run.records("end")[-1]["reason"] == reason
    assert f"**{reason[0].upper()}{reason[1:]} at step " in (run.run / "training_log.md").read_text(encoding="utf-8")


def test_ranks_whose_launcher_is_killed_save_and_leave_and_their_folder_is_locked_until_then(
    tmp_path: Path, models_file: Path, corpus_folder: Path
) -> None:
    with FaultyRun(tmp_path, models_file, corpus_folder, gpus=2) as run:
        run.until_step()
        run.signal(signal.SIGUSR1)  # save and go on
        run.until(run.saved, 10)
        first, second = run.ranks()

        refused = run_cli("train", "--name", "a", "--resume", "--models-file", models_file, cwd=tmp_path)
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert f"The run logs/a is in use by process {first.pid} (since " in refused.stderr
        assert second.is_running()

        kill(run.launcher())
        run.until(lambda: not run.ranks(), 10)
        assert run.end(10) == 1
        assert "The run logs/a did not end well: DeepSpeed's launcher was killed by SIGKILL." in run.output
        left_in_good_order(run, "the launcher is gone")


def test_a_sigterm_to_the_deepspeed_program_ends_its_ranks(
    tmp_path: Path, models_file: Path, corpus_folder: Path
) -> None:
    runner = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=2", f"--master_port={free_port()}"]
    command = [*runner, str(REPOSITORY / "gpt2ds" / "cli.py")]
    with FaultyRun(tmp_path, models_file, corpus_folder, command=command) as run:
        run.until_step()
        run.signal(signal.SIGTERM)
        run.until(lambda: not run.ranks(), 30)
        left_in_good_order(run, "the launcher is gone")
        assert json.loads((run.run / "outcome.json").read_text())["exit_code"] == 0


def test_restarts_begin_anew_or_go_on_from_the_last_checkpoint(
    tmp_path: Path, models_file: Path, corpus_folder: Path
) -> None:
    with FaultyRun(tmp_path, models_file, corpus_folder, gpus=2, restarts=2) as run:
        run.until_step()
        assert not run.saved()
        lost = run.ranks()[1]
        kill(lost)
        run.until(lambda: "Restart 1" in run.output, 40)
        message = f"Rank 1 (process {lost.pid}) is gone; its last step was "
        assert message in run.output
        (incident,) = run.records("incident")
        assert incident["what"].startswith(message)
        assert "Restart 1 of 2 of the run logs/a from the start, since no checkpoint was completed: " in run.output

        run.until(lambda: len(run.records("start")) == 2, 60)
        run.until_step()
        run.signal(signal.SIGUSR1)
        run.until(run.saved, 20)
        assert len(run.ranks()) == 2
        for rank in run.ranks():
            kill(rank)
        run.until(lambda: "Restart 2" in run.output, 20)
        assert "from step-" in run.output and "a rank was killed by SIGKILL" in run.output
        run.until(lambda: len(run.records("start")) == 3, 60)
        run.until_step()
        resumed = [record["resumed_from"] for record in run.records("start")]
        assert resumed[:2] == [None, None]
        assert resumed[2].startswith("step-")

        run.signal(signal.SIGTERM)
        assert run.end(30) == 0
        left_in_good_order(run, "interrupted by SIGTERM")


def test_a_rank_that_hangs_is_named(tmp_path: Path, models_file: Path, corpus_folder: Path) -> None:
    with FaultyRun(tmp_path, models_file, corpus_folder, gpus=2, rank_timeout=0.1) as run:
        run.until_step()
        hung = run.ranks()[1]
        time.sleep(1.5)  # what it says of itself is up to a second old
        hung.suspend()
        run.until(lambda: "has not moved" in run.output, 20)
        assert f"Rank 1 (process {hung.pid}) has not moved for 6 s: it was in step" in run.output
        assert "a signal stopped it (SIGSTOP, Ctrl-Z)" in run.output
        hung.kill()  # as the launcher would after 30 s
        assert run.end(20) != 0
        assert run.records("end")[-1]["reason"] == "failed: a rank was lost"


def test_a_second_ctrl_c_ends_a_rank_that_waits_for_ever(
    tmp_path: Path, models_file: Path, corpus_folder: Path
) -> None:
    with FaultyRun(tmp_path, models_file, corpus_folder, ranks=2) as run:
        run.until_step()
        waiting, hung = run.ranks()
        hung.suspend()
        time.sleep(1)  # by now the other one waits for it, in a collective
        for _ in range(2):  # at once: one Ctrl-C that came in two ways
            waiting.send_signal(signal.SIGINT)
            time.sleep(0.1)
        time.sleep(LEAVE_SECONDS + 1)
        assert waiting.is_running()
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(10) in (None, 130)  # None: it is no child of this process


def test_where_rank_0_is_lost_another_one_tells_it_and_writes_the_log(
    tmp_path: Path, models_file: Path, corpus_folder: Path
) -> None:
    with FaultyRun(tmp_path, models_file, corpus_folder, ranks=2) as run:
        run.until_step()
        lost = run.ranks()[0]
        time.sleep(1.5)  # what it says of itself is up to a second old
        kill(lost)
        run.until(lambda: not run.ranks(), 30)
        message = f"Rank 0 (process {lost.pid}) is gone; its last step was "
        assert run.output.count(message) == 1
        assert run.records("incident")[-1]["what"].startswith(message)
        assert run.records("end")[-1]["reason"] == "failed: a rank was lost"
        assert message in (run.run / "training_log.md").read_text(encoding="utf-8")


def test_a_mistake_of_the_user_is_not_tried_again(tmp_path: Path, models_file: Path) -> None:
    start = time.monotonic()
    result = run_cli("train", "--restarts", 3, "--models-file", models_file, "--data", "nowhere", cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count("Error:") == 1
    assert "Restart" not in result.stderr
    assert time.monotonic() - start < 30


def test_exit_code_0_without_a_word_is_a_failure_and_failing_alike_again_and_again_stops(
    tmp_path: Path, models_file: Path, corpus_folder: Path
) -> None:
    # Python runs this first in every process, and only a rank has a rank.
    (tmp_path / "sitecustomize.py").write_text("import os\nif 'RANK' in os.environ:\n    os._exit(0)\n")
    environment = {"PYTHONPATH": str(tmp_path)}
    with FaultyRun(tmp_path, models_file, corpus_folder, environment=environment, restarts=5) as run:
        assert run.end(60) == 1
        why = "its ranks ended with exit code 0 but did not say that the run was over"
        start = "the start, since no checkpoint was completed"
        assert run.output.splitlines() == [
            f"Restart 1 of 5 of the run logs/a from {start}: {why}.",
            f"Restart 2 of 5 of the run logs/a from {start}: {why}.",
            "The run logs/a is not started again: 2 restarts in a row ended at step 0 without a new checkpoint "
            f"({why}).",
        ]
