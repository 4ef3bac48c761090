"""Where documents start and end, and which of them validate."""

from pathlib import Path

import numpy as np
import pytest

from gpt2ds.corpus.documents import Documents, FileDocuments, collect, find_documents, split_documents, transcode
from gpt2ds.errors import UserError


def pieces(path: Path, found: FileDocuments) -> list[bytes]:
    text = path.read_bytes()
    return [text[start:end] for start, end in zip(found.starts, found.ends, strict=True)]


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_file_is_a_document(tmp_path: Path) -> None:
    path = write(tmp_path, "one\n\ntwo")
    found = find_documents(path, None, "boundary")
    assert pieces(path, found) == [b"one\n\ntwo"]
    assert (found.markers, found.first_marker, found.undecodable) == (0, None, None)


def test_separator_and_empty_documents(tmp_path: Path) -> None:
    path = write(tmp_path, "--one----two-- \n\t--\n three--")
    assert pieces(path, find_documents(path, "--", "boundary")) == [b"one", b"two", b"\n three"]


@pytest.mark.parametrize("separator", [None, "\n\n", "<|endoftext|>", "|>\n"])
def test_markers_end_documents(tmp_path: Path, separator: str | None) -> None:
    path = write(tmp_path, "one<|endoftext|>\ntwo<|endoftext|><|endoftext|>three")
    found = find_documents(path, separator, "boundary")
    expected = [b"one", b"two" if separator == "|>\n" else b"\ntwo", b"three"]
    assert pieces(path, found) == expected
    assert found.markers == 3


def test_markers_as_text_are_counted_only(tmp_path: Path) -> None:
    path = write(tmp_path, "one\n\ntwo <|endoftext|> more\n")
    found = find_documents(path, None, "text")
    assert pieces(path, found) == [path.read_bytes()]
    assert (found.markers, found.first_marker_line) == (1, 3)


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbfone")
    assert pieces(path, find_documents(path, None, "boundary")) == [b"one"]


def test_empty_and_blank_files_hold_no_document(tmp_path: Path) -> None:
    for text in (b"", b"\xef\xbb\xbf", b" \r\n" * 100):
        assert len(find_documents(write(tmp_path, text), None, "boundary").starts) == 0


@pytest.mark.parametrize("where", [0, 5, (1 << 20) - 1, 1 << 20, (1 << 20) + 7])
def test_wrong_bytes_are_located(tmp_path: Path, where: int) -> None:
    path = write(tmp_path, ("é" * (where // 2) + "x" * (where % 2)).encode() + b"\xff rest")
    found = find_documents(path, None, "boundary")
    assert found.undecodable is not None
    assert f"byte 0xff at offset {where:,} " in found.undecodable


def test_a_character_cut_off_at_the_end_is_located(tmp_path: Path) -> None:
    found = find_documents(write(tmp_path, "abc€".encode()[:-1]), None, "boundary")
    assert found.undecodable is not None and "offset 3 " in found.undecodable


def test_transcode(tmp_path: Path) -> None:
    text = "Ärger und naïve Übergänge\n" * 100_000
    for encoding in ("latin-1", "utf-16", "utf-16-le", "gb18030", "cp1252"):
        source, target = tmp_path / "in.txt", tmp_path / "out.txt"
        source.write_bytes(text.encode(encoding))
        assert transcode(source, encoding, target) is None
        assert target.read_text(encoding="utf-8") == text
    source.write_bytes("späte".encode("latin-1") * 300_000)
    wrong = transcode(source, "ascii", target)
    assert wrong is not None and "byte 0xe4 at offset 2 " in wrong
    source.write_bytes(b"a" * ((1 << 20) + 10) + b"\x81")
    wrong = transcode(source, "cp1252", target)
    assert wrong is not None and f"offset {(1 << 20) + 10:,} " in wrong


def documents_of(sizes: list[int]) -> Documents:
    ends = np.cumsum(sizes, dtype=np.int64)
    return Documents(file=np.zeros(len(sizes), dtype=np.int32), start=ends - np.array(sizes), end=ends)


def test_split_holds_its_share_and_never_all() -> None:
    documents = documents_of([100] * 1000)
    split = split_documents(documents, 0.05, 1, [])
    assert len(split.validation) == 50
    rows = sorted([*split.validation.start.tolist(), *split.training.start.tolist()])
    assert rows == documents.start.tolist()
    assert np.all(np.diff(split.validation.start) > 0)
    assert np.all(np.diff(split.training.start) > 0)
    again = split_documents(documents, 0.05, 1, [])
    other = split_documents(documents, 0.05, 2, [])
    assert again.validation.start.tolist() == split.validation.start.tolist() != other.validation.start.tolist()
    assert len(split_documents(documents, 0.999999, 1, []).training) > 0


@pytest.mark.parametrize("seed", range(20))
def test_a_huge_document_never_validates(seed: int) -> None:
    split = split_documents(documents_of([10_000, 90, 110, 100]), 0.01, seed, [])
    assert 90 <= int(split.validation.size_bytes.sum()) <= 300
    assert split.note is None


def test_the_smallest_document_when_none_is_small_enough() -> None:
    split = split_documents(documents_of([5000, 900, 4000, 5000]), 0.01, 3, [])
    assert split.validation.size_bytes.tolist() == [900]


def test_a_single_document_is_cut_after_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "".join(f"line {n}\n" for n in range(1000)))
    documents = collect([find_documents(path, None, "boundary")])
    split = split_documents(documents, 0.1, 1, [path])
    text = path.read_bytes()
    cut = int(split.validation.start[0])
    assert text[cut - 1 : cut] == b"\n"
    assert (split.training.start[0], split.training.end[0], split.validation.end[0]) == (0, cut, len(text))
    assert 0.09 * len(text) < len(text) - cut < 0.11 * len(text)
    assert split.note is not None and "single document" in split.note


@pytest.mark.parametrize(("text", "before"), [("word " * 50, b" "), ("ü" * 50, "ü".encode()), ("ab", b"a")])
def test_a_single_document_without_lines(tmp_path: Path, text: str, before: bytes) -> None:
    path = write(tmp_path, text)
    split = split_documents(collect([find_documents(path, None, "boundary")]), 0.1, 1, [path])
    cut = int(split.validation.start[0])
    assert path.read_bytes()[:cut].endswith(before)
    assert path.read_bytes()[:cut].decode() + path.read_bytes()[cut:].decode() == text
    assert split.training.size_bytes[0] > 0 < split.validation.size_bytes[0]


def test_one_byte_cannot_be_split(tmp_path: Path) -> None:
    for text in ("a", "€"):
        path = write(tmp_path, text)
        with pytest.raises(UserError, match="too short"):
            split_documents(collect([find_documents(path, None, "boundary")]), 0.1, 1, [path])


def test_two_large_documents_lose_only_a_tail(tmp_path: Path) -> None:
    first, second = tmp_path / "1.txt", tmp_path / "2.txt"
    first.write_text("line\n" * 1000)
    second.write_text("longer line\n" * 1000)
    documents = collect([find_documents(path, None, "boundary") for path in (first, second)])
    split = split_documents(documents, 0.01, 1, [first, second])
    assert split.validation.file.tolist() == [1]
    assert split.training.size_bytes.tolist()[0] == 5000
    assert 100 < int(split.validation.size_bytes[0]) < 300
    assert split.note is not None and "largest" in split.note
