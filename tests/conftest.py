"""Fixtures that all tests share: a small real corpus and a small model."""

import json
import pydoc_data.topics
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import PROFILES

# Wide enough to have every kind of layer, small enough that a step takes milliseconds.
MODELS = """
models:
  small: {emb_dim: 32, n_heads: 2, n_layers: 2, context_length: 32}
  tiny: {emb_dim: 8, n_heads: 2, n_layers: 2, context_length: 16}
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
    """A user's own models file, with `small` and `tiny`."""
    path = tmp_path_factory.mktemp("models") / "models.yaml"
    path.write_text(MODELS, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def fp32_profiles(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The shipped profiles of ZeRO-2 and 3, by stage, in fp32."""
    folder = tmp_path_factory.mktemp("profiles")
    paths = {}
    for stage in (2, 3):
        profile = json.loads((PROFILES / f"zero{stage}.json").read_text(encoding="utf-8"))
        del profile["bf16"]
        paths[stage] = folder / f"zero{stage}_fp32.json"
        paths[stage].write_text(json.dumps(profile), encoding="utf-8")
    return paths


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
