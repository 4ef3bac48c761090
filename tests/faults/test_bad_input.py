"""Whatever a user or a stranger hands us: exit code 2, one readable message, nothing changed on the disk, no hang.

Every case is wrong by construction, so that a refusal is the only right answer. The commands run for real, one after
the other in a process of theirs (bad_input_worker.py).
"""

import copy
import inspect
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from faults.bad_input import Cases, link_tree, put
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import PROFILES, run_cli
from training.made_run import make_run

from gpt2ds.corpus.shards import header
from gpt2ds.ds_keys import SECTIONS

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


# The JSON profile.

SHIPPED = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(PROFILES.glob("*.json"))}
Place = tuple[str, ...]


def places(content: Any, at: Place = ()) -> list[tuple[Place, Any]]:
    """Every key of a JSON object and of those in it, with its value."""
    found: list[tuple[Place, Any]] = []
    for key, value in content.items():
        found.append(((*at, key), value))
        if isinstance(value, dict):
            found += places(value, (*at, key))
    return found


def section_of(content: dict[str, Any], at: Place) -> dict[str, Any]:
    for key in at:
        content = content[key]
    return content


def wrong_values(value: Any) -> list[Any]:
    """Values that are no mere other setting of a key that now has this one."""
    if isinstance(value, bool):
        return [[], {}, 7, "maybe", [True], {"enabled": True}]
    if isinstance(value, int | float):
        return [[], {}, "many", [value], {"value": value}, True, -1, math.nan, math.inf, -math.inf, 10**30, str(value)]
    if isinstance(value, str):
        return [[], {}, 7, [value], False]
    if isinstance(value, list):
        return [{}, 7, "x", [*value, 0.5], value[:1], [str(item) for item in value], [2, 3], [[], []]]
    return [[], 7, "x", True, [value]]


@st.composite
def broken_profiles(draw: st.DrawFn) -> str:
    """The text of a shipped profile with one or two mistakes in it."""
    profile = copy.deepcopy(SHIPPED[draw(st.sampled_from(sorted(SHIPPED)))])
    kind = draw(st.sampled_from(["value", "typo", "unknown", "both", "text"]))
    if kind in ("value", "both"):
        at, value = draw(st.sampled_from(places(profile)))
        section_of(profile, at[:-1])[at[-1]] = draw(st.sampled_from(wrong_values(value)))
    if kind in ("typo", "both"):
        at, value = draw(st.sampled_from(places(profile)))
        section, known = section_of(profile, at[:-1]), SECTIONS[".".join(at[:-1])].keys if at[0] != "gpt2ds" else {}
        where = draw(st.integers(0, len(at[-1]) - 1))
        key = at[-1][:where] + draw(st.sampled_from(["", "_", "X", "ü", at[-1][where] * 2])) + at[-1][where + 1 :]
        if key == at[-1] or key in known or key in section:
            key += "_x"
        section[key] = section.pop(at[-1])
    if kind == "unknown":
        names = st.text(st.characters(codec="utf-8"), max_size=30).map(lambda text: f"zz {text}")
        section = section_of(profile, draw(st.sampled_from([(), ("gpt2ds",), ("optimizer",), ("optimizer", "params")])))
        section[draw(names)] = draw(st.sampled_from([1, None, "x", [], {}, True]))
    text = json.dumps(profile, indent=draw(st.sampled_from([None, 2])), ensure_ascii=draw(st.booleans()))
    if kind == "text":
        text = text[: draw(st.integers(0, len(text) - 1))]
    return text


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


ZERO2 = json.dumps(SHIPPED["zero2"])
NO_PROFILES: dict[str, bytes] = {
    "empty": b"",
    "white": b" \n\t",
    "null": b"null",
    "a number": b"3",
    "a string": b'"zero2"',
    "a list": b"[" + ZERO2.encode() + b"]",
    "binary": bytes(range(256)) * 40,
    "zeros": bytes(10_000),
    "utf-16": ZERO2.encode("utf-16"),
    "latin-1": ZERO2.replace("bf16 with", "für").encode("latin-1"),
    "half a character": ZERO2.encode() + b"\xe4\xb8",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep value": b'{"bf16": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "huge number": ZERO2.replace('"gradient_clipping": 1.0', f'"gradient_clipping": {"9" * 10_000}').encode(),
    "huge float": ZERO2.replace('"gradient_clipping": 1.0', '"gradient_clipping": 1e999').encode(),
    "a key twice": ZERO2.replace("{", '{"gradient_clipping": 2.0, ', 1).encode(),
    "a section twice": ZERO2.replace("{", '{"bf16": {"enabled": false}, ', 1).encode(),
    "a comment": ZERO2.replace("{", "{ // mine\n", 1).encode(),
    "a comma too many": ZERO2.replace("}", ",}", 1).encode(),
    "single quotes": ZERO2.replace('"', "'").encode(),
    "two objects": (ZERO2 * 2).encode(),
    "yaml": b"bf16:\n  enabled: true\n",
    "escape sequences": ZERO2.replace("gradient_clipping", "\\u001b[31mred\\u0007").encode(),
    "a million keys": json.dumps({f"key{number}": 1 for number in range(100_000)}).encode(),
    "a long key": json.dumps({"k" * 1_000_000: 1}).encode(),
    "a long value": json.dumps({"gradient_clipping": "9" * 1_000_000}).encode(),
    "a lone surrogate": b'{"\\ud800": 1}',
    "a surrogate as value": b'{"train_micro_batch_size_per_gpu": "\\udfff"}',
}


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


# The command line.


def commands() -> dict[str, Callable[..., Any]]:
    """Every command that there is, with the function behind it."""
    from gpt2ds.cli import app

    functions = [(info.name, info.callback) for info in app.registered_commands]
    return {name or each.__name__.replace("_", "-"): each for name, each in functions if each is not None}


REQUIRED: dict[str, list[str]] = {"generate": ["a", "x"], "evaluate": ["a"], "report": ["a"]}
REQUIRED |= {"export": ["a", "--out", "hf"]}


def malformed() -> Iterator[list[str]]:
    """For every command: an option that is not, an argument too many or none, and no number where one belongs."""
    for name, function in sorted(commands().items()):
        words = [name, *REQUIRED.get(name, [])]
        yield [*words, "--no-such-option"]
        yield [*words, *(["--packages"] if name == "prepare" else ["one", "argument", "too", "many"])]
        if name in REQUIRED:
            yield [name]
        for parameter in inspect.signature(function).parameters.values():
            kind, about = get_args(parameter.annotation)[:2]
            if {int, float} & {kind, *get_args(kind), *(x for one in get_args(kind) for x in get_args(one))}:
                declared = [text for text in about.param_decls or () if text.startswith("--")]
                yield [*words, *(declared or [f"--{parameter.name.replace('_', '-')}"])[:1], "many"]


MALFORMED = [*malformed(), [], ["--no-such-option"], ["trian"], ["train", "train"], ["--version=3"], [""]]


@pytest.mark.parametrize("arguments", MALFORMED, ids=" ".join)
def test_commands_that_are_malformed(cases: Cases, arguments: list[str]) -> None:
    if arguments:
        cases.refused(arguments, cases.fresh())
    else:  # help, and not a mistake to be told
        assert cases.run(arguments, cases.fresh())["code"] == 2


TRAIN = ["train", "--ds", "fp32_baseline", "--model", "small"]
ESTIMATE = ["memory-estimate", "--ds", "zero2", "--model", "gpt2_tiny"]
BENCH = ["bench", "--ds", "fp32_baseline", "--model", "small"]
NUMBERS = ["0", "-1", "nan", "inf"]
# CORPUS, MODELS and RUN stand for the ones that are sound.
SENSELESS: list[list[str]] = [
    *([*TRAIN, "--data", "CORPUS", "--models-file", "MODELS", *more] for more in (
        *(["--lr", value] for value in (*NUMBERS, "-inf")),
        *(["--hours", value] for value in NUMBERS),
        *(["--save-minutes", value] for value in NUMBERS),
        *([f"--{name}", value] for value in ("0", "-3") for name in (
            "micro-batch", "accumulation", "context", "steps", "tokens", "keep", "evaluate-every", "evaluation-windows",
            "evaluation-micro-batch", "save-every",
        )),
        *(["--gpu-memory", value] for value in (*NUMBERS, "1e-9")),
        ["--warmup-steps", "-1"],
        ["--micro-batch", "9" * 30],
        ["--context", "33"],
        ["--context", "9" * 30],
        ["--steps", "3", "--hours", "1"],
        ["--schedule", "cosin"],
        ["--recompute", "al"],
        ["--name", "../outside"],
        ["--name", "/tmp/outside"],
        ["--name", ".."],
        ["--name", "x" * 300],
        ["--out", "file.txt"],
        ["--model", "gpt2_smal"],
        ["--data", "nowhere"],
        ["--data", "file.txt"],
        ["--models-file", "nowhere.yaml"],
        ["--models-file", "file.txt"],
        ["--models-file", "huge.yaml"],
        ["--models-file", "alias.yaml"],
        ["--models-file", "object.yaml"],
        ["--resume"],
        ["--resume", "--name", "nothing"],
        ["--resume", "--name", "../../a"],
    )),
    *([*ESTIMATE, *more] for more in (
        *([f"--{name}", value] for value in ("0", "-3") for name in (
            "gpus", "nodes", "micro-batch", "accumulation", "context", "loss-chunk", "global-batch",
        )),
        *([f"--{name}", "9" * 30] for name in ("micro-batch", "accumulation", "context", "global-batch")),
        *(["--gpu-memory", value] for value in (*NUMBERS, "1e-9")),
        ["--recompute", "al"],
        ["--model", "gpt2_smal"],
        ["--models-file", "huge.yaml", "--model", "huge"],
        ["--write", "plan.json"],
        ["--fit", "--write", "nowhere/plan.json"],
        ["--fit", "--write", "file.txt"],
        ["--plot", "nowhere/plot.png"],
        ["--plot", "plot.xyz"],
    )),
    *([*BENCH, "--data", "CORPUS", "--models-file", "MODELS", *more] for more in (
        *(["--timeout", value] for value in ("0", "-1", "nan")),
        *([f"--{name}", value] for value in ("0", "-3") for name in (
            "micro-batch", "accumulation", "context", "gpus", "gpu-memory", "steps",
        )),
        ["--recompute", "al"],
        ["--data", "nowhere"],
        ["--largest"],
    )),
    *(["generate", "RUN", "Fruits", *more] for more in (
        *(["--tokens", value] for value in ("0", "-1")),
        *(["--temperature", value] for value in ("-1", "nan", "inf", "-inf")),
        ["--top-k", "-1"],
        ["--seed", "9" * 30],
    )),
    *(["evaluate", "RUN", *more] for more in (
        *([f"--{name}", value] for value in ("0", "-1") for name in ("windows", "micro-batch")),
        ["--data", "nowhere"],
        ["--data", "file.txt"],
    )),
    *(["export", "RUN", *more] for more in (
        ["--out", "full"],
        ["--out", "file.txt"],
        ["--out", "file.txt/hf"],
        ["--out", "x" * 300],
        *(["--out", "hf", "--checkpoint", name] for name in ("", "..", "../../a/checkpoints/step-00000004", "step-9")),
        ["--out", "hf", "--checkpoint", "step-00000004/"],
        ["--out", "hf", "--dtype", "int8"],
    )),
    *([command, source, *more] for source in ("nowhere", "file.txt", "full", "x" * 300, "", "loop")
      for command, *more in (["generate", "Fruits"], ["evaluate"], ["report"], ["export", "--out", "hf"])),
    *(["prepare", *more] for more in (
        ["nowhere.txt", "--out", "shards"],
        ["*.nothing", "--out", "shards"],
        ["empty.txt", "--out", "shards"],
        ["binary.bin", "--out", "shards"],
        ["file.txt"],
        ["file.txt", "--out", "file.txt"],
        ["file.txt", "--out", "file.txt/shards"],
        ["file.txt", "--out", "shards", "--packages", "torch"],
        ["--packages", "pandas", "--out", "shards"],
        ["--separator", "x", "--out", "shards"],
        *(["file.txt", "--out", "shards", "--validation", value] for value in ("-1", "2", "nan", "1", "inf")),
        *(["file.txt", "--out", "shards", "--processes", value] for value in ("0", "-1")),
        *(["file.txt", "--out", "shards", "--encoding", value] for value in ("utf-9", "", "base64")),
        ["file.txt", "--out", "shards", "--end-of-text", "maybe"],
        ["x" * 300, "--out", "shards"],
        ["file.txt", "--out", "x" * 300],
        ["loop", "--out", "shards"],
    )),
]  # fmt: skip


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


ALIASES = list(zip("abcdefghijklmnopqrstuvwxy", "bcdefghijklmnopqrstuvwxyz", strict=True))


# Token shards and corpus.json.

TOKENS = np.arange(60_000) % 1000


def shard(tokens: Any = TOKENS) -> bytes:
    return header(len(tokens)) + np.asarray(tokens, dtype="<u2").tobytes()


def fields(*numbers: int) -> bytes:
    """A header with these numbers in front, and some tokens after it."""
    return np.array([*numbers, *[0] * (256 - len(numbers))], dtype="<i4").tobytes() + bytes(2000)


BAD_SHARDS: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\0",
    "odd": shard() + b"\0",
    "truncated": shard()[:-2],
    "a token too many": shard() + b"\0\0",
    "half a header": shard()[:500],
    "only a header": header(60_000),
    "no tokens": header(0),
    "fewer than none": fields(20240520, 1, -1),
    "most there can be": fields(20240520, 1, 2**31 - 1),
    "another version": fields(20240520, 2, 1000),
    "llama": fields(20240801, 7, 1000),
    "evaluation": fields(20240522, 1, 1000),
    "big endian": np.frombuffer(shard()[:1024], dtype="<i4").astype(">i4").tobytes() + bytes(2000),
    "ids beyond": shard([*range(1000), 50257]),
    "all ids beyond": shard([65535] * 60_000),
    "text": b"It was a dark and stormy night. " * 64,
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
}


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


FORMS: dict[str, dict[str, bytes]] = {
    "nothing": {},
    "only train": {"a_train_000000.bin": shard()},
    "only val": {"a_val_000000.bin": shard()},
    "two corpora": {f"{name}_{split}_000000.bin": shard() for name in "ab" for split in ("train", "val")},
    "nanogpt odd": {"train.bin": bytes(2001), "val.bin": bytes(2000)},
    "nanogpt empty": {"train.bin": b"", "val.bin": bytes(2000)},
    "nanogpt without val": {"train.bin": bytes(2000)},
    "nanogpt characters": {"train.bin": bytes(2000), "val.bin": bytes(2000), "meta.pkl": b"\x80\x04."},
    "nanogpt ids": {"train.bin": b"\xff" * 2000, "val.bin": bytes(2000)},
    "too short": {"a_train_000000.bin": shard([1, 2]), "a_val_000000.bin": shard([1, 2])},
    "interrupted": {".progress.json": b"{}"},
    "text": {"text.txt": b"words"},
}


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("name", FORMS)
def test_corpora(cases: Cases, run: Path, models_file: Path, name: str, command: str) -> None:
    folder = cases.fresh()
    (folder / "data").mkdir()
    for file, content in FORMS[name].items():
        (folder / "data" / file).write_bytes(content)
    words = [*TRAIN, "--models-file", models_file] if command == "train" else ["evaluate", run]
    cases.refused([*words, "--data", "data"], folder, what=name)


REMOVED = object()
ODD = [REMOVED, None, [], {}, True, "x", -1, 1.5, 10**30, "\x1b[31mred", "x" * 100_000]
OUTSIDE = ["../../secret.bin", "/etc/passwd", "a/../../secret.bin", "..\\secret.bin", "link.bin", "", "."]
# Each is read by those who open a corpus; the rest of corpus.json is for people.
OF_CORPUS = ["format_version", "tokenizer", "tokenizer.vocab_size", "tokenizer.sha256", "splits", "digest"]
OF_CORPUS += ["splits.train", "splits.val", "splits.train.shards", "splits.val.shards"]
OF_CORPUS += [f"splits.{split}.shards.0{field}" for split in ("train", "val") for field in ("", ".file", ".tokens")]
OF_CORPUS += ["splits.train.shards.0.sha256"]


def changed(content: Any, at: str, value: Any) -> Any:
    """A copy with the value at a dotted place replaced or removed."""
    whole = inner = copy.deepcopy(content)
    *way, last = [int(key) if key.isdigit() else key for key in at.split(".")]
    for key in way:
        inner = inner[key]
    if value is REMOVED:
        del inner[last]
    else:
        inner[last] = value
    return whole


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


TEXTS: dict[str, bytes] = {
    name: content for name, content in NO_PROFILES.items() if not name.startswith(("a ", "single"))
}
TEXTS |= {"no field": b"{}", "infinite": b'{"format_version": Infinity}', "not a number": b"NaN"}


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_no_corpus_json(cases: Cases, corpus_folder: Path, models_file: Path, name: str) -> None:
    folder = corpus_case(cases, corpus_folder, TEXTS[name])
    cases.refused([*TRAIN, "--models-file", models_file, "--data", "data"], folder, what=name)


# A run folder: manifests, weights, plan.json.

THROUGH = {
    "generate": ["generate", "run", "Fruits", "--tokens", "2"],
    "evaluate": ["evaluate", "run", "--windows", "2"],
    "export": ["export", "run", "--out", "hf"],
}


def run_case(cases: Cases, run: Path) -> Path:
    """A folder with a copy of the run."""
    folder = cases.fresh()
    link_tree(run, folder / "run")
    return folder


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "run" / "checkpoints").glob("step-*"))


OF_MANIFEST = ["format", "position", "files", "position.step", "position.sequences_seen", "files.model~safetensors"]
OF_MANIFEST += ["position.elapsed_seconds", "position.skipped_steps", "files.model~safetensors.bytes"]
OF_MANIFEST += ["files.model~safetensors.sha256"]


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
        put(path / "manifest.json", with_change(content, at, value))
    cases.refused(THROUGH[through], folder, what=f"{at} {value!r:.50}")


def with_change(content: Any, at: str, value: Any) -> Any:
    """As `changed`; in a key ~ stands for a dot."""
    way = at.split(".")
    if "~" not in at:
        return changed(content, at, value)
    whole = copy.deepcopy(content)
    inner = section_of(whole, tuple(key.replace("~", ".") for key in way[:-1]))
    last = way[-1].replace("~", ".")
    if value is REMOVED:
        del inner[last]
    else:
        inner[last] = value
    return whole


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
        put(path / "manifest.json", content)
    cases.refused(THROUGH[through], folder, what=name)


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_no_manifest(cases: Cases, run: Path, name: str) -> None:
    folder = run_case(cases, run)
    for path in checkpoints(folder):
        put(path / "manifest.json", TEXTS[name])
    for through in sorted(THROUGH)[:: 1 if len(TEXTS[name]) < 1000 else 2]:
        cases.refused(THROUGH[through], folder, what=name)


def rewritten(weights: bytes, **changes: Any) -> bytes:
    """A weights file whose header says something else of the model, or whose first tensor lies elsewhere."""
    size = int.from_bytes(weights[:8], "little")
    head = json.loads(weights[8 : 8 + size])
    model = json.loads(head["__metadata__"]["gpt2ds"])
    first = next(name for name in head if name != "__metadata__")
    for name, value in changes.items():
        if name in ("shape", "data_offsets", "dtype"):
            head[first][name] = value
        else:
            model[name] = value
    head["__metadata__"]["gpt2ds"] = changes.get("metadata", json.dumps(model))
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + weights[8 + size :]


HEADERS: dict[str, dict[str, Any]] = {
    "more layers": {"n_layers": 3},
    "no end of layers": {"n_layers": 10**12},
    "huge": {"emb_dim": 10**15, "vocab_size": 10**15},
    "wider": {"emb_dim": 64},
    "odd heads": {"n_heads": 5},
    "no heads": {"n_heads": 0},
    "heads of text": {"n_heads": "two"},
    "layers of lists": {"n_layers": [2]},
    "negative": {"context_length": -32},
    "a bias that is not there": {"qkv_bias": True},
    "a bias of text": {"qkv_bias": "no"},
    "dropout": {"drop_rate": 7},
    "dropout nan": {"drop_rate": math.nan},
    "no object": {"metadata": "[1, 2]"},
    "a number": {"metadata": "3"},
    "no JSON": {"metadata": "{"},
    "deep": {"metadata": "[" * 20_000},
    "another shape": {"shape": [32]},
    "beyond the file": {"data_offsets": [0, 10**12]},
    "backwards": {"data_offsets": [128, 0]},
    "another type": {"dtype": "I8"},
    "no type": {"dtype": "X9"},
}
DAMAGES: dict[str, Any] = {
    name: lambda w, changes=changes: rewritten(w, **changes) for name, changes in HEADERS.items()
}
DAMAGES |= {
    "weights empty": lambda w: b"",
    "weights cut": lambda w: w[: len(w) // 2],
    "weights zeros": lambda w: bytes(1000),
    "a header without end": lambda w: (2**62).to_bytes(8, "little") + w[8:],
    "weights are text": lambda w: b"words " * 500,
    "weights are a pickle": lambda w: (
        b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
    ),
    "weights of a zip": lambda w: b"PK\x03\x04" + bytes(500),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_weights_from_strangers(cases: Cases, run: Path, name: str) -> None:
    """Alone and in a run whose manifest fits them: a stranger can write that as well."""
    import hashlib

    folder = run_case(cases, run)
    for path in checkpoints(folder):
        weights = DAMAGES[name]((path / "model.safetensors").read_bytes())
        put(path / "model.safetensors", weights)
        content = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        described = {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
        put(path / "manifest.json", with_change(content, "files.model~safetensors", described))
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


# plan.json and its neighbours, by those who need them.


def is_object(content: bytes) -> bool:
    """Whether it is some JSON object, which is all that the training log asks of ds_config.json."""
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False


NO_PLANS = TEXTS
NO_OBJECTS = {name: content for name, content in TEXTS.items() if not is_object(content)}
RESUME = ["train", "--resume", "--out", ".", "--name", "run"]


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


PLAN_CHANGES: list[tuple[list[str], str, Any]] = [
    *((["report", "run"], at, value) for at in ("model", "batch") for value in (REMOVED, None, [], "x", 7)),
    *((["evaluate", "run"], "data", value) for value in (REMOVED, None, [], 7, "nowhere")),
    *((["evaluate", "run"], "data.folder", value) for value in (REMOVED, None, [], 7, "nowhere")),
    *((RESUME, "options", value) for value in (REMOVED, None, [], "x", 7)),
    *((RESUME, "identity", value) for value in (REMOVED, None, [], {}, "x", 7)),
    *((RESUME, f"identity.{at}", value) for at in ("data", "seed", "model n_layers") for value in (REMOVED, [], "x")),
    *((RESUME, "options.steps", value) for value in ("many", [], {}, -1, 0, 1.5, "1e9", 10**400)),
    *((RESUME, "options.ds", value) for value in (7, [], {}, "", "zero9", "../nowhere.json")),
    *((RESUME, "options.data", value) for value in (7, [], {}, "", "nowhere", "../..")),
    *((RESUME, "options.model", value) for value in (7, [], {}, "gpt2_smal")),
    *((RESUME, "options.models_file", value) for value in (7, [], {}, "nowhere.yaml")),
    *((RESUME, "options.lr", value) for value in ("fast", [], {}, -1, math.nan)),
    *((RESUME, "options.schedule", value) for value in (7, [], {}, "cosin")),
    *((RESUME, "options.keep", value) for value in ("many", [], {}, -1, 0)),
    *((RESUME, "options.seed", value) for value in ("seven", [], {}, 1.5)),
]  # fmt: skip


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
        put(path / "manifest.json", content)
    result = run_cli(*RESUME, cwd=folder)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert "no complete checkpoint" in result.stderr
    cases.seen.add("resume")


def test_there_were_enough(cases: Cases, request: pytest.FixtureRequest) -> None:
    here = [item for item in request.session.items if item.path == request.node.path]
    if len(here) < EVERY_TEST_AT_LEAST:
        pytest.skip("only some of them were run")
    assert len(cases.seen) >= 500
