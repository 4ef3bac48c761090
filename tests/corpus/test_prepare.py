"""Text to shards: what they hold, for every number of processes, and every mistake a user can make."""

import json
import os
import shutil
import sysconfig
from pathlib import Path

import pytest

from gpt2ds.corpus import units
from gpt2ds.corpus.prepare import PrepareOptions, prepare
from gpt2ds.corpus.shards import Corpus, open_corpus, read_shard
from gpt2ds.corpus.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, load_tokenizer
from gpt2ds.errors import UserError

TOPICS = Path(sysconfig.get_paths()["stdlib"], "pydoc_data", "topics.py")


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of real text: one large file and ten small ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    content = TOPICS.read_text(encoding="utf-8")
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "large.txt").write_text(content[:150_000], encoding="utf-8")
    for number in range(10):
        (folder / f"small{number}.txt").write_text(content[150_000 + 4000 * number :][:4000], encoding="utf-8")
    return folder


def shards_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}


def tokens_of(corpus: Corpus, split: str) -> list[int]:
    shards = corpus.val if split == "val" else corpus.train
    return [int(token) for shard in shards for token in read_shard(shard.path)]


def expected_tokens(documents: list[str]) -> list[int]:
    tokens = []
    for document in documents:
        tokens += [END_OF_TEXT_ID, *load_tokenizer().encode_ordinary(document)]
    return tokens


def test_every_document_after_an_end_of_text(text: Path) -> None:
    corpus = prepare(["text"], Path("out"), options=PrepareOptions(processes=1, validation_fraction=0.03))
    documents = {path.name: path.read_text(encoding="utf-8") for path in sorted(text.iterdir())}
    val = tokens_of(corpus, "val")
    assert 4 > val.count(END_OF_TEXT_ID) > 0
    chosen = [load_tokenizer().decode(part) for part in split_at_end_of_text(val)]
    assert set(chosen) <= set(documents.values())
    assert val == expected_tokens([document for document in documents.values() if document in chosen])
    assert tokens_of(corpus, "train") == expected_tokens(
        [document for document in documents.values() if document not in chosen]
    )
    assert (corpus.name, corpus.vocab_size) == ("out", 50257)
    assert [shard.path.name for shard in (*corpus.val, *corpus.train)] == ["out_val_000000.bin", "out_train_000001.bin"]


def split_at_end_of_text(tokens: list[int]) -> list[list[int]]:
    starts = [at for at, token in enumerate(tokens) if token == END_OF_TEXT_ID]
    return [tokens[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]


def test_identical_bytes_for_any_number_of_processes(text: Path) -> None:
    corpora = []
    for processes in (1, 2, 3):
        options = PrepareOptions(name="same", processes=processes, shard_tokens=7000)
        corpora.append(prepare(["text"], Path(f"out{processes}"), options=options))
    assert shards_of(Path("out1")) == shards_of(Path("out2")) == shards_of(Path("out3"))
    assert len(shards_of(Path("out1"))) > 5
    assert len({corpus.digest for corpus in corpora}) == 1
    manifests = {Path(f"out{processes}", "corpus.json").read_bytes() for processes in (1, 2, 3)}
    assert len(manifests) == 1
    assert str(Path.cwd()) not in manifests.pop().decode()


def test_shards_are_filled_and_numbered(text: Path) -> None:
    whole = prepare(["text"], Path("whole"), options=PrepareOptions(processes=1))
    cut = prepare(["text"], Path("cut"), options=PrepareOptions(processes=1, shard_tokens=1000))
    assert tokens_of(cut, "train") == tokens_of(whole, "train")
    assert tokens_of(cut, "val") == tokens_of(whole, "val")
    assert {shard.tokens for shard in (*cut.val[:-1], *cut.train[:-1])} == {1000}
    names = [shard.path.name for shard in (*cut.val, *cut.train)]
    assert [int(name[-10:-4]) for name in names] == list(range(len(names)))
    assert whole.digest != cut.digest


def test_the_record(text: Path) -> None:
    corpus = prepare(["text"], Path("out"), options=PrepareOptions(processes=1, origin={"from": "topics"}))
    manifest = json.loads(Path("out/corpus.json").read_text())
    assert manifest["tokenizer"]["vocab_size"] == 50257
    assert manifest["origin"] == {"from": "topics"}
    assert [source["path"] for source in manifest["sources"]][:2] == ["text/large.txt", "text/small0.txt"]
    assert manifest["sources"][1]["bytes"] == 4000 or manifest["sources"][1]["bytes"] > 4000
    assert manifest["splits"]["train"]["tokens"] == corpus.train_tokens
    assert manifest["splits"]["val"]["documents"] + manifest["splits"]["train"]["documents"] == 11
    assert open_corpus(Path("out"), verify_digests=True) == corpus


def test_progress_reaches_the_end(text: Path) -> None:
    seen: list[tuple[int, int, int]] = []
    corpus = prepare(["text"], Path("out"), options=PrepareOptions(processes=2), progress=lambda *now: seen.append(now))
    assert seen[0][0] == seen[0][2] == 0
    assert seen == sorted(seen)
    assert seen[-1] == (seen[0][1], seen[0][1], corpus.train_tokens + corpus.val_tokens)
    assert len(seen) > 8


def test_a_finished_corpus_is_done_at_once(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = PrepareOptions(processes=1)
    first = prepare(["text"], Path("out"), options=options)
    calls: list[object] = []
    assert prepare(["text"], Path("out"), options=options, progress=lambda *now: calls.append(now)) == first
    os.utime(text / "large.txt")  # touched but the same: known by its sha256
    assert (
        prepare(["text"], Path("out"), options=PrepareOptions(processes=2), progress=lambda *now: calls.append(now))
        == first
    )
    assert calls == []


def test_a_finished_corpus_of_other_text_is_not_replaced(text: Path) -> None:
    first = prepare(["text"], Path("out"), options=PrepareOptions(processes=1))
    before = shards_of(Path("out"))
    for options in (PrepareOptions(processes=1, seed=2), PrepareOptions(processes=1, name="other")):
        with pytest.raises(UserError, match="finished corpus of other text or options"):
            prepare(["text"], Path("out"), options=options)
    (text / "more.txt").write_text("more")
    with pytest.raises(UserError, match="finished corpus of other text or options"):
        prepare(["text"], Path("out"), options=PrepareOptions(processes=1))
    assert shards_of(Path("out")) == before
    replaced = prepare(["text"], Path("out"), options=PrepareOptions(processes=1, overwrite=True))
    assert replaced.digest != first.digest


def test_a_damaged_corpus_is_made_anew(text: Path) -> None:
    first = prepare(["text"], Path("out"), options=PrepareOptions(processes=1))
    first.train[0].path.unlink()
    notes: list[str] = []
    assert prepare(["text"], Path("out"), options=PrepareOptions(processes=1), note=notes.append) == first
    assert "damaged" in notes[0]


def test_a_damaged_corpus_of_other_text_is_not_replaced(text: Path) -> None:
    Path("out").mkdir()
    Path("out/corpus.json").write_text("{}")
    with pytest.raises(UserError, match="holds a damaged corpus of other text or options"):
        prepare(["text"], Path("out"), options=PrepareOptions(processes=1))
    prepare(["text"], Path("out"), options=PrepareOptions(processes=1, overwrite=True))


def test_shards_of_others_are_not_touched(text: Path) -> None:
    Path("out").mkdir()
    foreign = Path("out/out_train_000001.bin")
    foreign.write_bytes(b"precious")
    with pytest.raises(UserError, match="already holds shards named out_"):
        prepare(["text"], Path("out"), options=PrepareOptions(processes=1))
    assert foreign.read_bytes() == b"precious"


def test_marker_policies(text: Path) -> None:
    shutil.rmtree(text)
    text.mkdir()
    (text / "a.txt").write_text(f"first\n{END_OF_TEXT}second")
    (text / "b.txt").write_text("third " * 100)
    notes: list[str] = []

    def tokens(policy: str) -> list[int]:
        options = PrepareOptions(processes=1, end_of_text=policy)  # type: ignore[arg-type]
        corpus = prepare(["text"], Path(policy), options=options, note=notes.append)
        assert json.loads(Path(policy, "corpus.json").read_text())["end_of_text_markers"] == 1
        return tokens_of(corpus, "val") + tokens_of(corpus, "train")

    boundary, as_text = tokens("boundary"), tokens("text")
    assert load_tokenizer().encode_ordinary("second") in split_at_end_of_text(boundary)
    assert load_tokenizer().encode_ordinary(f"first\n{END_OF_TEXT}second") in split_at_end_of_text(as_text)
    assert boundary.count(END_OF_TEXT_ID) == as_text.count(END_OF_TEXT_ID) + 1
    assert any("1 times" in note and "end of a document" in note for note in notes)
    assert any("1 times" in note and "ordinary text" in note for note in notes)
    with pytest.raises(
        UserError, match=r"text/a\.txt holds <\|endoftext\|> \(1 times, first in line 2\).*--end-of-text"
    ):
        prepare(["text"], Path("refuse"), options=PrepareOptions(processes=1, end_of_text="refuse"))


def test_wrong_encodings_are_all_named(text: Path) -> None:
    (text / "small3.txt").write_bytes("straße".encode("latin-1"))
    (text / "small5.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError) as caught:
        prepare(["text"], Path("out"), options=PrepareOptions(processes=2))
    assert "text/small3.txt is not UTF-8: byte 0xdf at offset 4 " in str(caught.value)
    assert "text/small5.txt is not UTF-8: byte 0xe9 at offset 0 " in str(caught.value)
    assert str(caught.value).count("--encoding") == 2
    assert not list(Path("out").glob("*.bin"))


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_give_the_same_tokens(text: Path, encoding: str) -> None:
    shutil.rmtree(text)
    text.mkdir()
    other = Path("other")
    other.mkdir()
    content = TOPICS.read_text(encoding="utf-8").encode("latin-1", "ignore").decode("latin-1")
    for name, part in (("a.txt", content[:60_000]), ("b.txt", "¿Qué? " + content[60_000:61_000])):
        (text / name).write_text(part, encoding="utf-8")
        (other / name).write_text(part, encoding=encoding)
    plain = prepare(["text"], Path("out"), options=PrepareOptions(processes=1))
    recoded = prepare(["other"], Path("out2"), options=PrepareOptions(processes=2, encoding=encoding))
    assert recoded.digest == plain.digest
    assert sorted(path.name for path in Path("out2").iterdir()) == [
        ".progress.json",
        "corpus.json",
        "out2_train_000001.bin",
        "out2_val_000000.bin",
    ]


def test_a_wrong_encoding_option_is_named(text: Path) -> None:
    content = (text / "large.txt").read_bytes() + "é".encode()
    (text / "large.txt").write_bytes(content)
    expected = rf"text/large\.txt is not ascii: byte 0x[0-9a-f]+ at offset {first_above(content):,} .*--encoding"
    with pytest.raises(UserError, match=expected):
        prepare(["text"], Path("out"), options=PrepareOptions(processes=1, encoding="ascii"))


def first_above(content: bytes) -> int:
    return next(at for at, byte in enumerate(content) if byte > 127)


def test_bad_options_in_one_error(text: Path) -> None:
    options = PrepareOptions(name="../x", validation_fraction=0.0, shard_tokens=0, processes=0, separator="")
    with pytest.raises(UserError) as caught:
        prepare(["text"], Path("out"), options=options)
    assert len(str(caught.value).splitlines()) == 5
    assert not Path("out").exists()


def test_blank_text(text: Path) -> None:
    Path("blank.txt").write_text(" \n\n")
    with pytest.raises(UserError, match="the text is empty"):
        prepare(["blank.txt"], Path("out"), options=PrepareOptions(processes=1))


def test_a_single_document_says_what_became_of_it(text: Path) -> None:
    notes: list[str] = []
    corpus = prepare(["text/large.txt"], Path("out"), options=PrepareOptions(processes=1), note=notes.append)
    assert "single document" in notes[0]
    both = load_tokenizer().decode(tokens_of(corpus, "train")[1:]) + load_tokenizer().decode(
        tokens_of(corpus, "val")[1:]
    )
    assert both == (text / "large.txt").read_text(encoding="utf-8")


def test_no_room_on_the_disk(text: Path) -> None:
    huge = text / "huge.txt"
    with huge.open("wb") as file:
        file.write(b"x")
        file.truncate(4 * shutil.disk_usage(text).free)  # a sparse file: it takes no room itself
    with pytest.raises(UserError, match=r"the disk of out has .* GiB free, the shards need about .* GiB"):
        prepare([str(huge)], Path("out"), options=PrepareOptions(processes=1))


def test_a_text_that_grows_meanwhile_is_refused(text: Path) -> None:
    def grow(done: int, total: int, tokens: int) -> None:
        with (text / "small9.txt").open("a") as file:
            file.write("more")

    with pytest.raises(UserError, match=r"text/small9\.txt changed while it was read"):
        prepare(["text"], Path("out"), options=PrepareOptions(processes=1), progress=grow)
    assert not Path("out/corpus.json").exists()


def test_one_prepare_at_a_time(text: Path) -> None:
    refused: list[str] = []

    def again(done: int, total: int, tokens: int) -> None:
        if not refused:
            with pytest.raises(UserError) as caught:
                prepare(["text"], Path("out"), options=PrepareOptions(processes=1))
            refused.append(str(caught.value))

    prepare(["text"], Path("out"), options=PrepareOptions(processes=1), progress=again)
    assert "another gpt2ds prepare is writing to out" in refused[0]


def test_a_file_in_the_way(text: Path) -> None:
    Path("out").write_text("a file")
    with pytest.raises(UserError, match="the folder out cannot be made"):
        prepare(["text"], Path("out"), options=PrepareOptions(processes=1))
