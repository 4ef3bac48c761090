"""Which files TEXT arguments mean."""

import os
from pathlib import Path

import pytest

from gpt2ds.corpus.sources import check_encoding, gather
from gpt2ds.errors import UserError


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("bee")
    (folder / "a.md").write_text("ay")
    (folder / "deep" / "c.txt").write_text("see")
    (folder / "deep" / "code.py").write_text("print('text too')")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\r")
    (folder / "noise.dat").write_bytes(b"\xff\xfe\xfd\xfc" * 10)
    (folder / ".hidden.txt").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("hidden too")
    return folder


def test_folder_recursively_sorted_and_skipping(texts: Path) -> None:
    gathered = gather(["texts"])
    labels = [source.label for source in gathered.sources]
    assert labels == ["texts/a.md", "texts/b.txt", "texts/deep/c.txt", "texts/deep/code.py"]
    assert gathered.skipped == {"binary": 2, "hidden": 1}
    assert [source.size_bytes for source in gathered.sources] == [2, 3, 3, 17]


def test_each_file_once_whatever_the_arguments(texts: Path) -> None:
    several = gather(["texts/deep/c.txt", "texts", "texts/*.txt", str(texts / "b.txt")]).sources
    assert [source.path for source in several] == [source.path for source in gather(["texts"]).sources]


def test_glob(texts: Path) -> None:
    assert [source.label for source in gather(["texts/**/*.txt"]).sources] == ["texts/b.txt", "texts/deep/c.txt"]


def test_a_name_with_brackets_is_a_file_first(texts: Path) -> None:
    (texts / "odd[1].txt").write_text("odd")
    assert [source.label for source in gather(["texts/odd[1].txt"]).sources] == ["texts/odd[1].txt"]


def test_absolute_arguments_leave_no_absolute_labels(texts: Path) -> None:
    labels = [source.label for source in gather([str(texts / "deep"), str(texts / "b.txt")]).sources]
    assert labels == ["b.txt", "deep/c.txt", "deep/code.py"]


def test_the_output_folder_is_no_text(texts: Path) -> None:
    (texts / "out").mkdir()
    (texts / "out" / "corpus.json").write_text("{}")
    assert not any("corpus.json" in source.label for source in gather(["texts"], exclude=texts / "out").sources)


def test_all_missing_arguments_in_one_error(texts: Path) -> None:
    (texts / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        gather(["absent.txt", "texts/*.tex", "texts/empty", "texts/b.txt"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "absent.txt" in lines[0]
    assert "texts/*.tex" in lines[1]
    assert "texts/empty holds no text file" in lines[2]


def test_empty_text_and_no_argument(texts: Path) -> None:
    (texts / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty, no byte in texts/empty\.txt"):
        gather(["texts/empty.txt"])
    with pytest.raises(UserError, match="no text was given"):
        gather([])


def test_a_pipe_is_refused_and_not_waited_for(texts: Path) -> None:
    os.mkfifo(texts / "pipe.txt")
    assert gather(["texts"]).skipped["not a regular file"] == 1
    with pytest.raises(UserError, match="not a regular file"):
        gather(["texts/pipe.txt"])


def test_utf16_files_are_text_under_their_encoding(texts: Path) -> None:
    (texts / "wide.txt").write_text("wide", encoding="utf-16")
    assert gather(["texts"]).skipped["binary"] == 3
    assert any(source.label == "texts/wide.txt" for source in gather(["texts"], encoding="utf-16").sources)


def test_encodings() -> None:
    assert check_encoding("utf8") and check_encoding("UTF-8-sig")
    assert not check_encoding("latin-1")
    for unknown in ("utf-9", "base64"):
        with pytest.raises(UserError, match=f"unknown encoding '{unknown}'"):
            check_encoding(unknown)
