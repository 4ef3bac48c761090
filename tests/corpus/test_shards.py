"""Shards that can be read, and all the ways in which they cannot."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2ds.corpus.prepare import PrepareOptions, prepare
from gpt2ds.corpus.shards import Corpus, check_ids, header, open_corpus, read_shard
from gpt2ds.errors import UserError

TOKENS = np.arange(2000, dtype="<u2")


def llmc(path: Path, tokens: np.ndarray[Any, Any] = TOKENS) -> Path:
    path.write_bytes(header(len(tokens)) + tokens.astype("<u2").tobytes())
    return path


@pytest.fixture
def prepared(tmp_path: Path) -> Corpus:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"This is line {n} of the text.\n" for n in range(2000)))
    return prepare([str(text)], tmp_path / "mine", options=PrepareOptions(processes=1, shard_tokens=5000))


def edit(corpus: Corpus, change: Any) -> None:
    path = corpus.folder / "corpus.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def problems(folder: Path, **options: bool) -> list[str]:
    with pytest.raises(UserError) as caught:
        open_corpus(folder, **options)
    return str(caught.value).splitlines()


def test_header_is_llmcs() -> None:
    fields = np.frombuffer(header(77), dtype="<i4")
    assert len(fields) == 256
    assert fields[:3].tolist() == [20240520, 1, 77]
    assert not fields[3:].any()


def test_both_formats(tmp_path: Path) -> None:
    with_header = read_shard(llmc(tmp_path / "a.bin"))
    assert isinstance(with_header, np.memmap) and with_header.dtype == np.uint16
    assert np.array_equal(with_header, TOKENS)
    (tmp_path / "b.bin").write_bytes(TOKENS.tobytes())
    assert np.array_equal(read_shard(tmp_path / "b.bin"), TOKENS)
    with pytest.raises(UserError, match=r"not in llm.c's format"):
        read_shard(tmp_path / "b.bin", with_header=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(10) + b"\0" * 18, "truncated: its header says 10 tokens = 1,044 bytes, the file has 1,042"),
        (header(10) + b"\0" * 22, "damaged"),
        (header(0), "damaged"),
        (header(10)[:500], "truncated"),
        (np.array([20240801, 7, 5], dtype="<i4").tobytes(), "a Llama-3 shard"),
        (np.array([20240522, 1, 5], dtype="<i4").tobytes(), "an llm.c evaluation file"),
        (np.array([20240520, 2, 5], dtype="<i4").tobytes(), "format version 2"),
        (b"", "holds 0 bytes"),
        (b"odd", "holds 3 bytes"),
    ],
)
def test_bad_shards(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_shard(path)


def test_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read: No such file"):
        read_shard(tmp_path / "absent.bin")


def test_public_llmc_shards(tmp_path: Path) -> None:
    for number, split in enumerate(("val", "train", "train")):
        llmc(tmp_path / f"fineweb_{split}_{number:06d}.bin", TOKENS[: 1000 * (number + 1)])
    (tmp_path / "hellaswag.txt").write_text("not ours")
    corpus = open_corpus(tmp_path)
    assert (corpus.name, corpus.vocab_size, corpus.val_tokens, corpus.train_tokens) == ("fineweb", 50257, 1000, 4000)
    assert corpus.digest.startswith("quick-")
    assert open_corpus(tmp_path).digest == corpus.digest
    llmc(tmp_path / "fineweb_train_000002.bin", TOKENS[::-1])
    assert open_corpus(tmp_path).digest != corpus.digest


def test_bad_public_shards_are_all_named(tmp_path: Path) -> None:
    llmc(tmp_path / "fineweb_train_000001.bin")
    (tmp_path / "fineweb_train_000002.bin").write_bytes(TOKENS.tobytes())
    (tmp_path / "fineweb_train_000003.bin").write_bytes(header(5000) + TOKENS.tobytes())
    found = problems(tmp_path)
    assert len(found) == 3
    assert "fineweb_train_000002.bin is not in llm.c's format" in found[0]
    assert "fineweb_train_000003.bin is truncated" in found[1]
    assert "no val split" in found[2]


def test_shards_of_two_corpora(tmp_path: Path) -> None:
    for name in ("a_train_000001.bin", "a_val_000000.bin", "b_train_000001.bin"):
        llmc(tmp_path / name)
    assert "several corpora (a, b)" in problems(tmp_path)[0]


def test_nanogpt_folder(tmp_path: Path) -> None:
    folder = tmp_path / "openwebtext"
    folder.mkdir()
    (folder / "train.bin").write_bytes(TOKENS.tobytes())
    assert "has no val split" in problems(folder)[0]
    (folder / "val.bin").write_bytes(TOKENS[:100].tobytes())
    corpus = open_corpus(folder)
    assert (corpus.name, corpus.train_tokens, corpus.val_tokens) == ("openwebtext", 2000, 100)
    (folder / "meta.pkl").write_bytes(b"")
    assert "characters, not GPT-2 tokens" in problems(folder)[0]


def test_folders_without_a_corpus(tmp_path: Path) -> None:
    assert "no corpus folder" in problems(tmp_path / "absent")[0]
    assert f"gpt2ds prepare TEXT... --out {tmp_path}" in problems(tmp_path)[0]
    (tmp_path / ".progress.json").write_text("{}")
    llmc(tmp_path / "a_train_000001.bin")
    llmc(tmp_path / "a_val_000000.bin")
    assert "interrupted; give the same command again" in problems(tmp_path)[0]


def test_prepared_corpus(prepared: Corpus) -> None:
    assert open_corpus(prepared.folder, verify_digests=True) == prepared
    assert len(prepared.train) > 2
    assert prepared.train_tokens == sum(len(read_shard(shard.path)) for shard in prepared.train)


def test_all_problems_of_a_prepared_corpus_in_one_error(prepared: Corpus) -> None:
    prepared.train[0].path.unlink()
    with prepared.train[1].path.open("r+b") as file:
        file.truncate(2000)
    llmc(prepared.train[2].path)
    edit(prepared, lambda manifest: manifest["tokenizer"].update(name="llama", vocab_size=128256))
    found = problems(prepared.folder)
    assert len(found) == 4
    assert "tokenizer llama (vocabulary 128256)" in found[0]
    assert "cannot be read" in found[1]
    assert "truncated" in found[2]
    assert "corpus.json says 5,000" in found[3]


def test_other_ranks_are_another_tokenizer(prepared: Corpus) -> None:
    edit(prepared, lambda manifest: manifest["tokenizer"].update(sha256="0" * 64))
    assert "not GPT-2's" in problems(prepared.folder)[0]


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "a/../../secret.bin", "link.bin", "..\\secret.bin"])
def test_paths_out_of_the_folder_are_refused(prepared: Corpus, name: str) -> None:
    secret = llmc(prepared.folder.parent / "secret.bin")
    (prepared.folder / "link.bin").symlink_to(secret)
    edit(prepared, lambda manifest: manifest["splits"]["train"]["shards"][0].update(file=name))
    assert "outside its folder" in problems(prepared.folder)[0]


def test_changed_content_is_found_by_its_digest(prepared: Corpus) -> None:
    path = prepared.train[1].path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    open_corpus(prepared.folder)
    assert "another sha256" in problems(prepared.folder, verify_digests=True)[0]


def test_an_edited_manifest_is_noticed(prepared: Corpus) -> None:
    edit(prepared, lambda manifest: manifest["splits"]["val"]["shards"][0].update(sha256="0" * 64))
    assert "was edited" in problems(prepared.folder)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1 column 2"),
        ("[]", "format_version None"),
        ('{"format_version": 9}', "format_version 9"),
        ('{"format_version": 1}', "lacks the field 'tokenizer'"),
        ('{"format_version": 1, "tokenizer": 3}', "wrong kind"),
        (
            '{"format_version": 1, "tokenizer": {}, "splits": {"train": {"shards": ["x"]}}}',
            "lacks the field 'vocab_size'",
        ),
    ],
)
def test_bad_manifests(prepared: Corpus, content: str, message: str) -> None:
    (prepared.folder / "corpus.json").write_text(content)
    assert message in problems(prepared.folder)[0]


def test_no_validation_shards(prepared: Corpus) -> None:
    edit(prepared, lambda manifest: manifest["splits"]["val"].update(shards=[]))
    assert "names no val shard" in problems(prepared.folder)[0]


def test_ids_beyond_the_vocabulary(tmp_path: Path, prepared: Corpus) -> None:
    check_ids(prepared, prepared.vocab_size)
    tokens = TOKENS.copy()
    tokens[1234] = 50257
    llmc(tmp_path / "x_train_000001.bin", tokens)
    llmc(tmp_path / "x_val_000000.bin")
    corpus = open_corpus(tmp_path)
    with pytest.raises(
        UserError, match=r"x_train_000001\.bin holds token id 50257 at position 1,234, beyond the vocabulary of 50257"
    ):
        check_ids(corpus, 50257)
    check_ids(corpus, 50304)
