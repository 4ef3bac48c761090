"""The command line: starts light, accepts what launchers inject, and its messages."""

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import PROFILES, TESTS, cpu_environment, run_cli

PACKAGE = TESTS.parent / "gpt2ds"


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    program = (
        "import sys, gpt2ds.cli, gpt2ds.planning, gpt2ds.memory.fit\n"
        "print(sorted({'torch', 'deepspeed', 'matplotlib', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_script_that_the_launcher_starts(tmp_path: Path) -> None:
    """As DeepSpeed does it: by path, from anywhere, with --local_rank before the command."""
    command = [sys.executable, str(PACKAGE / "cli.py"), "--local_rank=0", "train", "--help"]
    result = subprocess.run(command, cwd=tmp_path, env=cpu_environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--accumulation" in result.stdout


def test_no_module_bears_the_name_of_another(tmp_path: Path) -> None:
    """The launcher puts gpt2ds/ itself first on the path, where our names could pass for others'."""
    for path in PACKAGE.iterdir():
        name = path.stem
        if name.startswith("__") or (path.is_dir() and not (path / "__init__.py").exists()):
            continue
        assert name not in sys.stdlib_module_names, name
        found = importlib.util.find_spec(name)
        # A folder of the tests without an __init__.py is no module.
        assert found is None or found.origin is None, f"{name} is installed at {found.origin}"


def test_profiles_are_explained(tmp_path: Path) -> None:
    result = run_cli("profiles", cwd=tmp_path, COLUMNS="200")
    assert result.returncode == 0, result.stderr
    for path in PROFILES.glob("*.json"):
        assert path.stem in result.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--gpus", 2], {"RANK": "0", "WORLD_SIZE": "1"}, "--gpus is for `gpt2ds train` when it starts the launcher"),
        (["--restarts", 2], {"RANK": "0", "WORLD_SIZE": "1"}, "--restarts is for `gpt2ds train` when it starts"),
        ([], {"RANK": "0"}, "RANK is set but WORLD_SIZE is not"),
    ],
)
def test_a_rank_in_the_environment_that_is_none(
    tmp_path: Path, arguments: list[Any], environment: dict[str, str], words: str
) -> None:
    result = run_cli("train", *arguments, cwd=tmp_path, **environment)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("Error: ") and words in result.stderr


def test_a_port_that_another_run_has_taken(tmp_path: Path, models_file: Path, corpus_folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = ["--ds", "fp32_baseline", "--model", "tiny", "--models-file", models_file, "--data", corpus_folder]
        result = run_cli("train", *words, cwd=tmp_path, **group)
    assert result.returncode == 2, result.stdout + result.stderr
    assert (
        f"Error: Port {port}, at which the ranks meet, is taken" in result.stderr and "Traceback" not in result.stderr
    )


def test_a_folder_in_which_the_embedded_text_cannot_be_prepared(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("no folder")
    result = run_cli("train", "--ds", "zero2", cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "The embedded text cannot be prepared in data/" in result.stderr and "Traceback" not in result.stderr


def test_launch_sh_empties_no_folder_that_is_not_its_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    script = Path(__file__).parents[1] / "launch.sh"
    environment = cpu_environment(GPT2DS_VENV=str(tmp_path))
    result = subprocess.run([script, "profiles"], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "is no virtual environment: name another folder in GPT2DS_VENV" in result.stderr
    assert mine.read_text() == "mine"


def test_prepare_says_what_it_made_and_counts_markers(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(4):
        (text / f"{number}.txt").write_text("Some words of a document. " * 50 + "<|endoftext|>" + "And more. " * 50)
    result = run_cli("prepare", "text", "--out", "data/mine", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "training and" in result.stdout
    assert "<|endoftext|> stands 4 times in the text" in result.stderr
    refused = run_cli("prepare", "text", "--out", "data/other", "--end-of-text", "refuse", cwd=tmp_path)
    assert refused.returncode == 2
    assert "0.txt" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prepare", "nowhere.txt", "--out", "x"], "nowhere.txt"),
        (["prepare", ".", "--out", "x"], "text"),
        (["prepare", "a.txt"], "--out"),
        (["prepare", "--packages", "pandas"], "pandas"),
        (["prepare", "binary.txt", "--out", "x"], "--encoding"),
        (["prepare", "empty.txt", "--out", "x"], "empty"),
        (["prepare", "a.txt", "--out", "x", "--end-of-text", "maybe"], "boundary"),
        (["generate", "nowhere", "hello"], "not a run folder"),
        (["evaluate", "nowhere"], "not a run folder"),
        (["report", "nowhere"], "nowhere"),
        (["trian"], "No such command"),
        (["train", "--steps", "many"], "--steps"),
        (["train", "--ds", "zero9"], "zero2"),
        (["train", "--ds", "broken.json"], "line 2"),
    ],
)
def test_mistakes_end_with_one_message_and_exit_code_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "binary.txt").write_bytes(b"caf\xe9 in latin-1\n" * 20)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "broken.json").write_text('{\n  "bf16": {,}\n}')
    (tmp_path / "a.txt").write_text("words " * 100)
    if "." in arguments:
        arguments = [argument if argument != "." else "only-empty" for argument in arguments]
        (tmp_path / "only-empty").mkdir()
    result = run_cli(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr
