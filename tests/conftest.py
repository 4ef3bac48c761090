"""Fixtures that all tests share: a small real corpus and a small model."""

import pydoc_data.topics
import shutil
from pathlib import Path

import numpy as np
import pytest

# Wide enough to have every kind of layer, small enough that a step takes milliseconds.
SMALL_MODEL = """
models:
  small:
    emb_dim: 32
    n_heads: 2
    n_layers: 2
    context_length: 32
"""


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of Python's own documentation topics, about 20 documents."""
    from gpt2ds.corpus.prepare import PrepareOptions, prepare

    folder = tmp_path_factory.mktemp("corpus")
    for name, text in sorted(pydoc_data.topics.topics.items())[:20]:
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    prepare([str(folder)], folder / "shards", options=PrepareOptions(validation_fraction=0.1, processes=1))
    return folder / "shards"


@pytest.fixture(scope="session")
def models_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own models file with the one model `small`."""
    path = tmp_path_factory.mktemp("models") / "models.yaml"
    path.write_text(SMALL_MODEL, encoding="utf-8")
    return path


@pytest.fixture
def wide_corpus(tmp_path: Path) -> Path:
    """Enough tokens of 1,024 for a step of any shipped profile, in llm.c's format without a corpus.json."""
    from gpt2ds.corpus.shards import header

    folder = tmp_path / "wide"
    folder.mkdir()
    for split, number, tokens in (("val", 0, 3_000), ("train", 1, 400_000)):
        content = np.zeros(tokens, dtype="<u2").tobytes()
        (folder / f"wide_{split}_{number:06d}.bin").write_bytes(header(tokens) + content)
    return folder


@pytest.fixture
def roomy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terabyte free, for plans on hypothetical machines: the disk that the tests run on is not theirs."""
    usage = shutil.disk_usage("/")._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
