"""Whatever a user or a stranger hands us: exit code 2, one readable message, nothing changed on the disk, no hang.

Every case is wrong by construction, so that a refusal is the only right answer. The commands run for real, one after
the other in a process of theirs (bad_input_worker.py).
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.bad_commands import ALIASES, MALFORMED, SENSELESS
from faults.bad_data import BAD_SHARDS, FORMS, ODD, OF_CORPUS, OUTSIDE, shard
from faults.bad_input import REMOVED, TRAIN, Cases, changed, link_tree, put
from faults.bad_profiles import NO_PROFILES, TEXTS, broken_profiles
from faults.bad_runs import DAMAGES, NO_OBJECTS, NO_PLANS, OF_MANIFEST, PLAN_CHANGES, RESUME, THROUGH
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import run_cli
from training.made_run import make_run

from gpt2ds.training.manifest import sealed

EVERY_TEST_AT_LEAST = 400


def drawn(count: int) -> settings:
    """So many examples, the same ones every time."""
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(derandomize=True, database=None, deadline=None, max_examples=count, suppress_health_check=slow)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cases]:
    found = Cases(tmp_path_factory.mktemp("bad"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, models_file: Path, corpus_folder: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("logs"), models_file, corpus_folder)


def profile_command(path: str, number: int, corpus: Path) -> list[Any]:
    if number % 2:
        return ["train", "--ds", path, "--data", corpus, "--model", "gpt2_tiny"]
    return ["memory-estimate", "--ds", path, "--model", "gpt2_tiny"]


@drawn(130)
@given(text=broken_profiles())
def test_profiles_with_a_mistake(cases: Cases, corpus_folder: Path, text: str) -> None:
    folder = cases.fresh()
    (folder / "mine.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    command = profile_command("mine.json", len(cases.seen), corpus_folder)
    message = cases.refused(command, folder, what=text)
    assert "mine.json" in message


@pytest.mark.parametrize("name", NO_PROFILES)
def test_files_that_are_no_profile(cases: Cases, corpus_folder: Path, name: str) -> None:
    folder = cases.fresh()
    (folder / "mine.json").write_bytes(NO_PROFILES[name])
    for number in (0, 1):
        cases.refused(profile_command("mine.json", number, corpus_folder), folder, what=name)


@pytest.mark.parametrize(
    "name", ["folder", "loop", "dangling", "", "x" * 300, "a\nb", "a\x1b[31mb", "\udcff.json", "a/b"]
)
def test_paths_that_are_no_profile(cases: Cases, corpus_folder: Path, name: str) -> None:
    folder = cases.fresh()
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    for number in (0, 1):
        cases.refused(profile_command(name, number, corpus_folder), folder)


@pytest.mark.parametrize("arguments", MALFORMED, ids=" ".join)
def test_commands_that_are_malformed(cases: Cases, arguments: list[str]) -> None:
    if arguments:
        cases.refused(arguments, cases.fresh())
    else:  # help, and not a mistake to be told
        assert cases.run(arguments, cases.fresh())["code"] == 2


@pytest.mark.parametrize("arguments", SENSELESS, ids=lambda words: " ".join(words)[:80])
def test_commands_that_make_no_sense(
    cases: Cases, arguments: list[str], corpus_folder: Path, models_file: Path, run: Path
) -> None:
    folder = cases.fresh()
    (folder / "file.txt").write_text("Some words and no more. " * 40)
    (folder / "empty.txt").write_text(" \n")
    (folder / "binary.bin").write_bytes(bytes(range(256)) * 9)
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine")
    (folder / "loop").symlink_to("loop")
    (folder / "huge.yaml").write_text(f"models: {{small: {{emb_dim: {10**17}, n_heads: 3, n_layers: {10**12}}}}}")
    (folder / "alias.yaml").write_text("a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in ALIASES))
    (folder / "object.yaml").write_text("models: !!python/object/apply:os.system ['touch made']")
    stands_for = {"CORPUS": corpus_folder, "MODELS": models_file, "RUN": run}
    cases.refused([stands_for.get(word, word) for word in arguments], folder)


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", [*BAD_SHARDS, "folder", "loop", "missing"])
def test_shards(cases: Cases, run: Path, models_file: Path, name: str, split: str, command: str) -> None:
    folder = cases.fresh()
    data = folder / "data"
    data.mkdir()
    for each in ("train", "val"):
        path = data / f"mine_{each}_000000.bin"
        if each == split and name in ("folder", "loop", "missing"):
            if name == "folder":
                path.mkdir()
            elif name == "loop":
                path.symlink_to(path.name)
        else:
            path.write_bytes(BAD_SHARDS[name] if each == split else shard())
    words = [*TRAIN, "--models-file", models_file] if command == "train" else ["evaluate", run]
    message = cases.refused([*words, "--data", "data"], folder, what=f"{name} {split}")
    assert "data" in message


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("name", FORMS)
def test_corpora(cases: Cases, run: Path, models_file: Path, name: str, command: str) -> None:
    folder = cases.fresh()
    (folder / "data").mkdir()
    for file, content in FORMS[name].items():
        (folder / "data" / file).write_bytes(content)
    words = [*TRAIN, "--models-file", models_file] if command == "train" else ["evaluate", run]
    cases.refused([*words, "--data", "data"], folder, what=name)


def corpus_case(cases: Cases, corpus_folder: Path, content: Any) -> Path:
    folder = cases.fresh()
    link_tree(corpus_folder, folder / "data")
    (folder / "secret.bin").write_bytes(shard())
    (folder / "data" / "link.bin").symlink_to(folder / "secret.bin")
    put(folder / "data" / "corpus.json", content)
    return folder


@drawn(110)
@given(at=st.sampled_from(OF_CORPUS), value=st.sampled_from(ODD), through=st.sampled_from(["train", "evaluate"]))
def test_fields_of_corpus_json(
    cases: Cases, corpus_folder: Path, models_file: Path, run: Path, at: str, value: Any, through: str
) -> None:
    content = json.loads((corpus_folder / "corpus.json").read_text(encoding="utf-8"))
    folder = corpus_case(cases, corpus_folder, changed(content, at, value))
    words = [*TRAIN, "--models-file", models_file] if through == "train" else ["evaluate", run]
    cases.refused([*words, "--data", "data"], folder, what=f"{at} {value!r:.50}")


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("split", ["train", "val"])
def test_paths_in_corpus_json_lead_nowhere_else(
    cases: Cases, corpus_folder: Path, models_file: Path, name: str, split: str
) -> None:
    content = json.loads((corpus_folder / "corpus.json").read_text(encoding="utf-8"))
    folder = corpus_case(cases, corpus_folder, changed(content, f"splits.{split}.shards.0.file", name))
    words = [*TRAIN, "--models-file", models_file, "--data", "data"]
    message = cases.refused(words, folder, what=f"{name} {split}")
    assert "corpus.json" in message or "data" in message


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_no_corpus_json(cases: Cases, corpus_folder: Path, models_file: Path, name: str) -> None:
    folder = corpus_case(cases, corpus_folder, TEXTS[name])
    cases.refused([*TRAIN, "--models-file", models_file, "--data", "data"], folder, what=name)


def run_case(cases: Cases, run: Path) -> Path:
    """A folder with a copy of the run."""
    folder = cases.fresh()
    link_tree(run, folder / "run")
    return folder


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "run" / "checkpoints").glob("step-*"))


@drawn(60)
@given(
    at=st.sampled_from(OF_MANIFEST),
    value=st.sampled_from([REMOVED, None, [], {}, "x", 1.5, "\x1b[31mred", "x" * 100_000, math.nan]),
    through=st.sampled_from(sorted(THROUGH)),
)
def test_fields_of_manifests(cases: Cases, run: Path, at: str, value: Any, through: str) -> None:
    """Of all checkpoints, so that there is none left to fall back to."""
    if at == "position.elapsed_seconds" and value == 1.5:
        value = "soon"  # 1.5 seconds are a time
    folder = run_case(cases, run)
    for path in checkpoints(folder):
        content = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        put(path / "manifest.json", sealed(changed(content, at, value)))
    cases.refused(THROUGH[through], folder, what=f"{at} {value!r:.50}")


@pytest.mark.parametrize("name", ["../../../secret", "/etc/passwd", "a/../../../../secret", ".."])
@pytest.mark.parametrize("through", sorted(THROUGH))
def test_paths_in_manifests_lead_nowhere_else(cases: Cases, run: Path, name: str, through: str) -> None:
    folder = run_case(cases, run)
    (folder / "secret").write_text("secret")
    for path in checkpoints(folder):
        content = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        content["files"][name] = {
            "bytes": 6,
            "sha256": "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b",
        }
        put(path / "manifest.json", sealed(content))
    cases.refused(THROUGH[through], folder, what=name)


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_no_manifest(cases: Cases, run: Path, name: str) -> None:
    folder = run_case(cases, run)
    for path in checkpoints(folder):
        put(path / "manifest.json", TEXTS[name])
    for through in sorted(THROUGH)[:: 1 if len(TEXTS[name]) < 1000 else 2]:
        cases.refused(THROUGH[through], folder, what=name)


@pytest.mark.parametrize("name", DAMAGES)
def test_weights_from_strangers(cases: Cases, run: Path, name: str) -> None:
    """Alone and in a run whose manifest fits them: a stranger can write that as well."""
    folder = run_case(cases, run)
    for path in checkpoints(folder):
        weights = DAMAGES[name]((path / "model.safetensors").read_bytes())
        put(path / "model.safetensors", weights)
        content = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        described = {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
        put(path / "manifest.json", sealed(changed(content, "files.model~safetensors", described)))
    (folder / "alone.safetensors").write_bytes(weights)
    cases.refused(THROUGH["export"], folder, what=name)
    cases.refused(["generate", "alone.safetensors", "Fruits"], folder, what=name)


@pytest.mark.parametrize("through", sorted(THROUGH))
def test_weights_that_the_manifest_does_not_know(cases: Cases, run: Path, through: str) -> None:
    for change in (
        lambda w: w[:-1],
        lambda w: w + b"\0",
        lambda w: w[:-5] + bytes([w[-5] ^ 1]) + w[-4:],
        lambda w: b"",
    ):
        folder = run_case(cases, run)
        for path in checkpoints(folder):
            put(path / "model.safetensors", change((path / "model.safetensors").read_bytes()))
        cases.refused(THROUGH[through], folder, what=str(folder))


@pytest.mark.parametrize("name", NO_PLANS)
@pytest.mark.parametrize("through", [["report", "run"], ["evaluate", "run"], RESUME], ids=lambda words: words[0])
def test_files_that_are_no_plan(cases: Cases, run: Path, name: str, through: list[str]) -> None:
    folder = run_case(cases, run)
    put(folder / "run" / "plan.json", NO_PLANS[name])
    cases.refused(through, folder, what=name)


@pytest.mark.parametrize("name", NO_OBJECTS)
def test_files_that_are_no_ds_config(cases: Cases, run: Path, name: str) -> None:
    folder = run_case(cases, run)
    put(folder / "run" / "ds_config.json", NO_OBJECTS[name])
    cases.refused(["report", "run"], folder, what=name)


@pytest.mark.parametrize("missing", ["plan.json", "ds_config.json", "metrics.jsonl"])
def test_report_without_its_files(cases: Cases, run: Path, missing: str) -> None:
    for instead in (None, "folder", "loop"):
        folder = run_case(cases, run)
        path = folder / "run" / missing
        path.unlink()
        if instead == "folder":
            path.mkdir()
        elif instead == "loop":
            path.symlink_to(missing)
        cases.refused(["report", "run"], folder, what=str(instead))


@pytest.mark.parametrize(("through", "at", "value"), PLAN_CHANGES, ids=lambda each: str(each)[:20])
def test_fields_of_plan_json(cases: Cases, run: Path, through: list[str], at: str, value: Any) -> None:
    folder = run_case(cases, run)
    content = json.loads((folder / "run" / "plan.json").read_text(encoding="utf-8"))
    put(folder / "run" / "plan.json", changed(content, at, value))
    cases.refused(through, folder, what=f"{at} {value!r:.50}")


def test_resume_finds_no_checkpoint_that_holds(cases: Cases, run: Path) -> None:
    """In a process of its own, because DeepSpeed is loaded before the checkpoints are looked at."""
    folder = run_case(cases, run)
    for path in checkpoints(folder):
        content = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        content["files"]["../../../secret"] = {"bytes": 6, "sha256": "0" * 64}
        put(path / "manifest.json", sealed(content))
    result = run_cli(*RESUME, cwd=folder)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert "no complete checkpoint" in result.stderr
    cases.seen.add("resume")


def test_there_were_enough(cases: Cases, request: pytest.FixtureRequest) -> None:
    here = [item for item in request.session.items if item.path == request.node.path]
    if len(here) < EVERY_TEST_AT_LEAST:
        pytest.skip("only some of them were run")
    assert len(cases.seen) >= 700
