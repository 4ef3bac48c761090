"""Sizes by name and from a user's file."""

from pathlib import Path

import pytest

from gpt2ds.errors import UserError
from gpt2ds.gpt2.config import MODELS, find_model, read_models


def test_flops_per_token_of_the_four_sizes() -> None:
    # 6 per multiplying weight + 12 L d T, in GFLOP; PaLM's count.
    expected = {"gpt2_small": 0.855, "gpt2_medium": 2.424, "gpt2_large": 5.202, "gpt2_xl": 10.278}
    for name, gigaflop in expected.items():
        assert MODELS[name].flops_per_token() / 1e9 == pytest.approx(gigaflop, abs=1e-3)


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'gpt2_large'"):
        find_model("gpt2-large")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("models:\n  a: {emb_dim: 10, n_heads: 3, n_layers: 1}", "not a multiple of n_heads 3; use 2"),
        ("models:\n  a: {emb_dim: 8, n_heads: 2}", "missing n_layers"),
        ("models:\n  a: {emb_dim: 8, n_heads: 2, n_layers: 1, n_embd: 3}", "unknown key n_embd"),
        ("models:\n  a: {emb_dim: -8, n_heads: 2, n_layers: 1}", "emb_dim must be a whole number from 1"),
        ("models:\n  a: {emb_dim: 8, n_heads: 2, n_layers: 1, drop_rate: 2}", "drop_rate"),
        ("models:\n  a: 3", "must be a mapping"),
        ("sizes: {}", "needs a section 'models:'"),
        ("models: [", "does not parse"),
    ],
)
def test_mistakes_in_a_models_file_are_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_models(path)


def test_all_mistakes_of_a_models_file_in_one_error(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("models:\n  a: 3\n  b: {emb_dim: 8, n_heads: 2}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_models(path)
    assert len(str(caught.value).splitlines()) == 2


def test_json_is_read_as_well(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    path.write_text(
        '{"models": {"a": {"emb_dim": 8, "n_heads": 2, "n_layers": 1, "qkv_bias": true}}}', encoding="utf-8"
    )
    assert read_models(path)["a"].qkv_bias
