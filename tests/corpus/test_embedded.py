"""The text that every machine has."""

import itertools
import sys
import sysconfig
from pathlib import Path

import pytest

from gpt2ds.corpus.embedded import PACKAGES, embedded_documents, prepare_embedded, prose
from gpt2ds.corpus.prepare import PrepareOptions, prepare
from gpt2ds.corpus.shards import Corpus, read_manifest, read_shard
from gpt2ds.corpus.tokenizer import END_OF_TEXT, load_tokenizer
from gpt2ds.errors import UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The standard library's and networkx's prose, made where an older embedded corpus lay."""
    folder = tmp_path_factory.mktemp("embedded")
    text = folder / "old.txt"
    text.write_text("What an older Python said.\n" * 100)
    origin = {"text": "documentation on this machine, filter 0", "python": "2.7"}
    prepare([str(text)], folder / "data", options=PrepareOptions(processes=1, name="embedded", origin=origin))
    return prepare_embedded(folder / "data", ["networkx"])


@pytest.fixture(scope="module")
def texts(corpus: Corpus) -> list[str]:
    """The documents in the shards."""
    decoded = [load_tokenizer().decode(read_shard(shard.path).tolist()) for shard in (*corpus.val, *corpus.train)]
    return [text for part in decoded for text in part.split(END_OF_TEXT)[1:]]


def test_enough_prose_once_each(corpus: Corpus, texts: list[str]) -> None:
    assert len(set(texts)) == len(texts) > 2000
    assert 380_000 < corpus.train_tokens + corpus.val_tokens < 620_000  # networkx: half of it
    assert 0.04 < corpus.val_tokens / (corpus.train_tokens + corpus.val_tokens) < 0.07


def test_it_is_prose(texts: list[str]) -> None:
    text = "\n\n".join(texts)
    assert text.count(">>>") < 20  # a few sentences speak of the prompt
    assert "::=" not in text
    for paragraph in text.split("\n\n"):
        assert len(paragraph.split()) >= 12
        assert paragraph[-1] in ".!?:"


def test_the_shards_hold_the_documents(texts: list[str]) -> None:
    first = list(itertools.islice(embedded_documents(), 300))
    assert len({name for name, _ in first}) == 300
    groups = [name.partition("/")[0] for name, _ in first]
    assert 60 < groups.count("topics") < 100
    assert groups == ["topics"] * groups.count("topics") + ["stdlib"] * groups.count("stdlib")
    assert {text for _, text in first} <= set(texts)
    assert not any("site-packages" in name or "/test/" in name for name, _ in first)


def test_the_folder(corpus: Corpus) -> None:
    names = sorted(path.name for path in corpus.folder.iterdir())
    assert names == [".progress.json", "corpus.json", "embedded_train_000001.bin", "embedded_val_000000.bin"]
    manifest = read_manifest(corpus.folder)
    assert {"text", "python", "networkx"} == set(manifest["origin"])
    assert [source["path"] for source in manifest["sources"]] == ["networkx.txt", "stdlib.txt", "topics.txt"]
    assert sysconfig.get_paths()["stdlib"] not in (corpus.folder / "corpus.json").read_text()


def test_a_second_call_is_done_at_once(corpus: Corpus) -> None:
    calls: list[object] = []
    assert prepare_embedded(corpus.folder, ["networkx"], progress=lambda *now: calls.append(now)) == corpus
    assert calls == []


def test_a_damaged_one_is_made_anew(corpus: Corpus) -> None:
    before = {shard.path: shard.path.read_bytes() for shard in corpus.train}
    corpus.train[0].path.unlink()
    assert prepare_embedded(corpus.folder, ["networkx"]) == corpus
    assert {shard.path: shard.path.read_bytes() for shard in corpus.train} == before


def test_the_filter() -> None:
    raw = """Return the widget that belongs to the given name, or None
    if there is no such widget
    in the whole registry.

    >>> widget("a") and some more words here that would otherwise be a whole sentence.

    Too short.

    .. note:: twelve words and more would stand here but it is a directive of Sphinx.

    | a | table | with | many | cells | and | words | in | it | that | counts | as | none. |

    a = 1 + 2; b = [3, 4]; c = {5: 6}; d = (7, 8); e = 9 ** 2; f = 1.0.

    The second paragraph is kept too, for it has enough words and ends as it should!"""
    assert prose(raw) == (
        "Return the widget that belongs to the given name, or None if there is no such widget "
        "in the whole registry.\n\n"
        "The second paragraph is kept too, for it has enough words and ends as it should!"
    )


def test_nothing_is_imported(corpus: Corpus) -> None:
    assert "antigravity" not in sys.modules
    assert "turtle" not in sys.modules


def test_an_unknown_package() -> None:
    with pytest.raises(UserError, match=f"'pandas': choose from {', '.join(PACKAGES)}"):
        next(embedded_documents(["pandas"]))


def test_no_other_corpus_is_replaced(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A text of one's own.\n" * 100)
    prepare([str(text)], tmp_path / "mine", options=PrepareOptions(processes=1))
    with pytest.raises(UserError, match="holds the corpus 'mine', which the embedded text does not replace"):
        prepare_embedded(tmp_path / "mine")
