"""Checkpoints whose files were damaged, one file at a time: found by name, passed over, and nothing lost but the way
from the checkpoint before.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import end_ranks, run_cli, start_ranks

from gpt2ds.errors import UserError
from gpt2ds.training.manifest import newest, newest_weights, read_manifest, sealed, verify

STEPS = 8
FIRST, SECOND, BEFORE, LAST = SAVED = [f"step-{step:08d}" for step in (2, 4, 6, 8)]
FILES = ("states-00000.safetensors", "states-00001.safetensors", "model.safetensors", "manifest.json")


def train_on_two_ranks(folder: Path, *words: Any) -> None:
    results = end_ranks(start_ranks(["-m", "gpt2ds", "train", *words], cwd=folder), cwd=folder)
    assert [(result.returncode, result.stderr) for result in results] == [(0, "")] * 2, results


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, models_file: Path, corpus_folder: Path, fp32_profiles: dict[int, Path]
) -> Path:
    """The unbroken run: two ranks, ZeRO-2 in fp32, with checkpoints at the steps 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("whole")
    words = ["--ds", fp32_profiles[2], "--models-file", models_file, "--model", "tiny", "--data", corpus_folder]
    words += ["--steps", STEPS, "--save-every", 2, "--keep", 4, "--micro-batch", 2, "--accumulation", 2]
    words += ["--evaluate-every", 100, "--evaluation-windows", 2, "--sample-tokens", 1, "--name", "a"]
    train_on_two_ranks(folder, *words)
    assert [path.name for path in checkpoints(folder)] == SAVED
    return folder


@pytest.fixture
def linked(whole: Path, tmp_path: Path) -> Path:
    """The checkpoints of a copy that shares the bytes of all its files: `put` replaces one."""
    shutil.copytree(whole / "logs", tmp_path / "logs", copy_function=os.link)
    return tmp_path / "logs" / "a" / "checkpoints"


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "logs" / "a" / "checkpoints").iterdir())


def put(path: Path, content: bytes | None) -> None:
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated by a byte": lambda content: content[:-1],
    "half of it": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "a byte more": lambda content: content + b"\0",
    "first bit": lambda content: flipped(content, 0),
    "a bit in the middle": lambda content: flipped(content, len(content) * 4 + 3),
    "last bit": lambda content: flipped(content, len(content) * 8 - 1),
    "removed": lambda content: None,
}


def passed_over(folder: Path, name: str = LAST) -> str:
    """Demands that the checkpoint is passed over and the one before it taken; returns what is said."""
    said: list[str] = []
    found = newest(folder, said.append)
    assert found is not None and found[0] == BEFORE, said
    (sentence,) = said
    assert sentence.startswith(f"Checkpoint {name} is passed over: ")
    return sentence


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_every_damage_of_every_file_is_found_by_name(linked: Path, name: str, damage: str) -> None:
    assert newest(linked, pytest.fail) == (LAST, verify(linked / LAST))
    file = linked / LAST / name
    put(file, DAMAGES[damage](file.read_bytes()))
    sentence = passed_over(linked)
    assert [other for other in FILES if other in sentence] == [name]


@pytest.mark.parametrize("name", FILES[:3])
def test_bits_anywhere_in_the_tensors_and_their_headers(linked: Path, name: str) -> None:
    file, draw = linked / LAST / name, random.Random(name)
    content = file.read_bytes()
    in_the_header = [draw.randrange(0, 2_000 * 8) for _ in range(8)]
    for bit in [*in_the_header, *(draw.randrange(0, len(content) * 8) for _ in range(12))]:
        put(file, flipped(content, bit))
        assert name in passed_over(linked), bit


def test_a_bit_of_every_byte_of_the_manifest(linked: Path) -> None:
    """But for those that say the same: a number's e may be an E."""
    file, draw = linked / LAST / "manifest.json", random.Random(5)
    content = file.read_bytes()
    said, same = json.loads(content), 0
    put(file, content)  # no longer shared
    for byte in range(len(content)):
        changed = flipped(content, byte * 8 + draw.randrange(8))
        file.write_bytes(changed)
        try:
            read_manifest(file.parent)
        except ValueError as error:
            assert "manifest.json" in str(error)
        else:
            assert json.loads(changed) == said, f"byte {byte}: {changed!r}"
            same += 1
    assert same < 5


def places(content: dict[str, Any], at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every field, and those of the objects in it."""
    found = []
    for name, value in content.items():
        found += [(*at, name), *(places(value, (*at, name)) if isinstance(value, dict) else [])]
    return found


# What they hold is for their readers to judge, or may be nothing.
FREE = {"identity", "versions", "learning_rate", "schedule", "sha256", "val_loss", "evaluate_every"}


def test_every_field_of_the_manifest_wrong_in_every_way(linked: Path) -> None:
    """By accident, when its digest tells, and by a hand that made the digest anew, when the types do."""
    file = linked / LAST / "manifest.json"
    text = file.read_text(encoding="utf-8")
    for place in places(json.loads(text)):
        for wrong in ("removed", None, "x", -1, 1.5, True, [], {}, [[1, 2, 3]], [["a", "b"]]):
            content = json.loads(text)
            inside = content
            for key in place[:-1]:
                inside = inside[key]
            earlier = inside.pop(place[-1])
            if wrong != "removed":
                inside[place[-1]] = wrong
            if type(earlier) is type(wrong) and earlier == wrong:
                continue
            put(file, json.dumps(content).encode())
            assert "manifest.json" in passed_over(linked), (place, wrong)
            of_its_type = type(earlier) is type(wrong) and wrong not in ([[1, 2, 3]], [["a", "b"]])
            a_number = place[-1] == "elapsed_seconds" or place[0] == "loss_scale"
            of_its_type |= a_number and (wrong == "removed" or type(wrong) in (int, float))
            unlisted = wrong == "removed" and place[-1] in FILES[:2]  # the load says what it lacks
            if not FREE & set(place) and not of_its_type and not unlisted:
                put(file, json.dumps(sealed(content)).encode())
                assert "manifest.json" in passed_over(linked), (place, wrong)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "", ".", "a/b", "../step-00000006/manifest.json"])
def test_a_manifest_that_names_a_file_elsewhere(linked: Path, name: str) -> None:
    secret = b"secret"
    (linked / "secret").write_bytes(secret)
    file = linked / LAST / "manifest.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["files"][name] = {"bytes": len(secret), "sha256": hashlib.sha256(secret).hexdigest()}
    put(file, json.dumps(sealed(content)).encode())
    assert "names a file outside the folder" in passed_over(linked)


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_not_read(linked: Path, tmp_path: Path, name: str) -> None:
    file = linked / LAST / name
    kept = file.rename(tmp_path / "kept")
    file.symlink_to(kept)  # with the right content
    assert f"{name} is a symbolic link" in passed_over(linked)
    file.unlink()
    file.symlink_to("nowhere")
    assert f"{name} is a symbolic link" in passed_over(linked)
    file.unlink()
    file.mkdir()
    assert name in passed_over(linked)
    file.rmdir()
    os.mkfifo(file)  # reading it would wait for ever
    assert name in passed_over(linked)


def test_a_checkpoint_folder_that_is_none(linked: Path) -> None:
    (linked / "step-00000009").write_text("a file")
    (linked / "step-00000010").symlink_to("step-00000010")
    (linked / "step-x").mkdir()
    said: list[str] = []
    found = newest(linked, said.append)
    assert found is not None and found[0] == LAST
    assert len(said) == 3 and all("manifest.json" in sentence for sentence in said)


def test_weights_fall_back_by_their_own_file_alone(linked: Path) -> None:
    run, said = linked.parent, []
    put(linked / LAST / FILES[0], b"")
    assert newest_weights(run, pytest.fail)[0] == linked / LAST / "model.safetensors", "generate needs no states"
    put(linked / LAST / "model.safetensors", flipped((linked / LAST / "model.safetensors").read_bytes(), 80_000))
    path, position = newest_weights(run, said.append)
    assert (path, position.step) == (linked / BEFORE / "model.safetensors", 6)
    assert len(said) == 1 and f"{LAST} is passed over: model.safetensors was changed" in said[0]
    for name in (BEFORE, SECOND, FIRST):
        put(linked / name / "model.safetensors", None)
    with pytest.raises(UserError, match="no complete checkpoint"):
        newest_weights(run, said.append)


def test_generate_says_what_it_passes_over(linked: Path) -> None:
    put(linked / LAST / "model.safetensors", b"")
    result = run_cli("generate", "a", "Fruits", "--tokens", 3, cwd=linked.parents[2])
    assert result.returncode == 0, result.stderr
    assert f"Checkpoint {LAST} is passed over: model.safetensors has 0 bytes" in result.stderr
    assert result.stdout


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "logs" / "a" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.parametrize(
    "damages",
    [
        {BEFORE: (FILES[1], "last bit")},
        {BEFORE: (FILES[3], "half of it"), SECOND: (FILES[2], "removed")},
    ],
    ids=["states", "manifest, weights"],
)
def test_a_resume_from_the_checkpoint_before_ends_alike(
    whole: Path, tmp_path: Path, damages: dict[str, tuple[str, str]]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    saved = folder / "logs" / "a" / "checkpoints"
    expected = {name: read_manifest(saved / name).files for name in SAVED}
    losses = {record["step"]: record["loss"] for record in records(folder, "step")}
    shutil.rmtree(saved / LAST)  # as if it had died before
    for name, (file, damage) in damages.items():
        put(saved / name / file, DAMAGES[damage]((saved / name / file).read_bytes()))
    whence = [name for name in SAVED[:-1] if name not in damages][-1]

    train_on_two_ranks(folder, "--resume")
    log = (folder / "logs" / "a" / "training_log.md").read_text(encoding="utf-8")
    for incident, (name, (file, _)) in zip(records(folder, "incident"), damages.items(), strict=True):
        assert incident["what"].startswith(f"Checkpoint {name} is passed over: ") and file in incident["what"]
        assert incident["what"] in log
    assert records(folder, "start")[-1]["resumed_from"] == whence
    again = {record["step"]: record["loss"] for record in records(folder, "step")[STEPS:]}
    assert again == {step: losses[step] for step in range(int(whence[5:]) + 1, STEPS + 1)}
    # Weights, master weights and moments, bit by bit; the damaged ones were written anew.
    assert {name: verify(saved / name).files for name in SAVED} == expected


def test_when_all_are_damaged_the_resume_is_refused_and_changes_nothing(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    for path, name in zip(checkpoints(folder), FILES, strict=True):
        put(path / name, b"")

    def content() -> dict[str, str]:
        """Of all that is no message between processes."""
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != ".ranks"]
        kept = [path for path in files if path.name not in (".lock", "deepspeed.log")]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}

    earlier = content()
    result = run_cli("train", "--resume", cwd=folder)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Error: --resume found no complete checkpoint in " in result.stderr
    assert "leave --resume out and choose another --name" in result.stderr
    for path, name in zip(checkpoints(folder), FILES, strict=True):
        assert f"Checkpoint {path.name} is passed over: " in result.stderr and name in result.stderr
    assert "Traceback" not in result.stderr
    assert content() == earlier
