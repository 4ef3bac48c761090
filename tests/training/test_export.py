"""Exported folders: opened by transformers without a word, equal in every logit and token, whole or not there."""

import json
import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training.made_run import make_run

from gpt2ds.corpus.tokenizer import END_OF_TEXT, VOCAB_SIZE, load_tokenizer
from gpt2ds.errors import UserError
from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.gpt2.model import GPT2
from gpt2ds.gpt2.weights import load_model, save_weights
from gpt2ds.training.export import export
from gpt2ds.training.inference import continue_text, load_run, validation_folder, validation_loss

FILES = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
FILES |= {"vocab.json", "merges.txt", "README.md"}


def lone_weights(path: Path, *, qkv_bias: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A weights file of ours, in which no bias is zero: one in the wrong place would show."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(name="small", emb_dim=48, n_heads=4, n_layers=3, context_length=32, qkv_bias=qkv_bias))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_weights(path, model.config, {name: tensor.to(dtype) for name, tensor in model.state_dict().items()})
    return path


def exported(source: Path, out: Path, **more: Any) -> tuple[Path, list[str]]:
    said: list[str] = []
    export(source, out, **({"checkpoint": "newest", "dtype": None} | more), tell=said.append)
    return out, said


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, models_file: Path, corpus_folder: Path) -> Path:
    """A run with two checkpoints; the older one has the better validation loss."""
    return make_run(tmp_path_factory.mktemp("logs"), models_file, corpus_folder)


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_transformers_opens_it_and_says_the_same(
    tmp_path: Path, qkv_bias: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = lone_weights(tmp_path / "model.safetensors", qkv_bias=qkv_bias)
    folder, _ = exported(source, tmp_path / "hf")
    assert {path.name for path in folder.iterdir()} == FILES

    transformers.logging.set_verbosity_warning()
    transformers.logging.disable_progress_bar()
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    ids = torch.randint(0, VOCAB_SIZE, (3, 32), generator=torch.manual_seed(1))
    with torch.no_grad():
        ours = load_model(source)(ids)
        torch.testing.assert_close(theirs.eval()(ids).logits, ours, rtol=0, atol=1e-5)
        again = load_model(folder / "model.safetensors")
        assert torch.equal(again(ids), ours), "and our own loader reads the exported file"

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Fruits are good", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=5)[0])
    assert text.startswith("Fruits are good")
    said = capfd.readouterr()
    assert (said.out + said.err).strip() == "", "no warning"


def varied_texts(count: int) -> list[str]:
    """Words, code, emoji, whitespace, marks, control characters and scripts of all kinds, strung together by chance."""
    draw = random.Random(5)
    parts = [
        "Fruits",
        " are good",
        "\n",
        "\n\n\n",
        "  ",
        "   ",
        "\t",
        "\r\n",
        " ",
        "\u00a0",
        "\u3000",
        "\u2028",
        "12345",
    ]
    parts += [" 3.14", "don't", " we'll", "I'VE", "'s", "naïve", "Über", "中文", "日本語", "한국어", "العربية", "हिन्दी"]
    parts += [
        "🙂",
        "👩‍👩‍👧‍👦",
        "🇩🇪",
        "\ufe0f",
        "e\u0301",
        "\u200b",
        "\x00",
        "\x7f",
        "<|",
        "|>",
        "<|endoftext",
        END_OF_TEXT,
    ]
    parts += [
        "def f(x):\n    return x**2",
        "{'a': [1, 2]}",
        "...",
        "?!",
        "—",
        "“”",
        "_",
        "\\",
        "ſ",
        "ﬁ",
        "Ⅷ",
        "²",
        "𝔘",
        "\ud7ff",
    ]
    return ["", *parts, *("".join(draw.choices(parts, k=draw.randint(2, 12))) for _ in range(count - 1 - len(parts)))]


def test_the_tokenizer_is_ours(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder, _ = exported(lone_weights(tmp_path / "model.safetensors"), tmp_path / "hf")
    ours = load_tokenizer()
    texts = varied_texts(240)
    texts += [Path(shutil.__file__).read_text(encoding="utf-8")[:20_000], "".join(map(chr, range(1, 0x3000)))]
    whole = transformers.GPT2TokenizerFast.from_pretrained(folder)
    parts = tmp_path / "parts"  # as programs that do not know tokenizer.json read it
    parts.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / name, parts)
    # transformers makes its own of the parts; other programs take tokenizer.json as it is.
    alone = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in texts:
        expected = ours.encode(text, allowed_special="all")
        assert alone.encode(text).ids == expected, text
        assert alone.decode(expected, skip_special_tokens=False) == ours.decode(expected), text
    for theirs in (whole, transformers.GPT2TokenizerFast.from_pretrained(parts)):
        assert len(theirs) == VOCAB_SIZE
        for text in texts:
            expected = ours.encode(text, allowed_special="all")
            assert theirs.encode(text) == expected, text
            assert theirs.decode(expected, clean_up_tokenization_spaces=False) == ours.decode(expected), text
        marker = theirs.encode(f"a{END_OF_TEXT}b", split_special_tokens=True)
        assert marker == ours.encode_ordinary(f"a{END_OF_TEXT}b")
    assert (whole.eos_token_id, whole.bos_token_id, whole.model_max_length) == (50256, 50256, 32)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_types(tmp_path: Path, dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    source = lone_weights(tmp_path / "model.safetensors", dtype=torch.bfloat16)
    folder, _ = exported(source, tmp_path / "hf", dtype=dtype)
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype="auto")
    assert {parameter.dtype for parameter in theirs.parameters()} == {expected}
    assert torch.equal(theirs.transformer.wte.weight, load_model(source).wte.weight.to(expected))


def test_numbers_beyond_fp16_are_refused(tmp_path: Path) -> None:
    source = lone_weights(tmp_path / "model.safetensors")
    model = load_model(source)
    with torch.no_grad():
        model.wte.weight[5, 5] = 1e6
    save_weights(source, model.config, model.state_dict())
    with pytest.raises(UserError, match="--dtype bf16"):
        exported(source, tmp_path / "hf", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    exported(source, tmp_path / "hf", dtype="bf16")


WATCHED = """
import sys, gpt2ds.cli
seen = set()
sys.addaudithook(lambda event, _: seen.add(event) if event == "pickle.find_class" else None)
gpt2ds.cli.app(sys.argv[1:], standalone_mode=False)
print(sorted(seen | ({"deepspeed", "transformers"} & set(sys.modules))))
"""


def test_a_run_with_its_card(run: Path, tmp_path: Path) -> None:
    """Through the command line, which loads neither DeepSpeed nor transformers for it, and opens nothing pickled."""
    (run / "checkpoints" / "step-00000004" / "states.pt").write_bytes(b"no pickle")
    words = [sys.executable, "-c", WATCHED, "export", str(run), "--out", "made/hf"]
    result = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first, seen = result.stdout.splitlines()
    assert first.startswith("made/hf: small at step 4")
    assert seen == "[]"

    card = (tmp_path / "made/hf/README.md").read_text(encoding="utf-8")
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    for words_of_card in (
        f"{plan['model']['parameters']:,}",
        plan["data"]["digest"],
        f"{4 * 2 * 32:,} (8 sequences)",
        "10.5000 nats",
        "| Optimizer steps | 4 |",
        "## Limits",
        "What it wrote at step 4",
    ):
        assert words_of_card in card, words_of_card
    assert str(run) not in card and plan["data"]["folder"] not in card, "no path of this machine"


def test_generate_and_evaluate_take_an_exported_folder_or_a_lone_file(run: Path, tmp_path: Path) -> None:
    folder, _ = exported(run, tmp_path / "hf")
    lone = shutil.copy(run / "checkpoints" / "step-00000004" / "model.safetensors", tmp_path / "lone.safetensors")
    texts, losses = set(), set()
    for source in (run, folder, Path(lone)):
        model, position = load_run(source, print)
        assert (position is not None) == (source is run)
        texts.add("".join(continue_text(model, "Fruits", tokens=8, temperature=0.8, top_k=50, seed=0)))
        losses.add(validation_loss(model, validation_folder(run), windows=4, micro_batch=2).loss)
    assert len(texts) == len(losses) == 1
    with pytest.raises(UserError, match="give --data"):
        validation_folder(folder)
    with pytest.raises(UserError, match="leave --checkpoint out"):
        exported(folder, tmp_path / "again", checkpoint="best")


def test_which_checkpoint(run: Path, tmp_path: Path) -> None:
    for checkpoint, name in (("newest", "step-00000004"), ("best", "step-00000002"), ("step-00000002",) * 2):
        folder, _ = exported(run, tmp_path / checkpoint, checkpoint=checkpoint)
        ours = load_model(run / "checkpoints" / name / "model.safetensors")
        assert torch.equal(load_model(folder / "model.safetensors").wte.weight, ours.wte.weight)
        assert "(perplexity" in (folder / "README.md").read_text(encoding="utf-8")
    for outside in ("../checkpoints/step-00000004", str(run / "checkpoints" / "step-00000004"), "step-9", "", ".."):
        with pytest.raises(UserError, match="has no checkpoint"):
            exported(run, tmp_path / "no", checkpoint=outside)


def test_a_damaged_log_costs_the_card_and_not_the_weights(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "plan.json").write_text('{"model": ')
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\x00 no record\n")
    folder, said = exported(copy, tmp_path / "hf")
    assert len(said) == 1 and "plan.json cannot be read" in said[0]
    assert "| Optimizer steps | 4 |" in (folder / "README.md").read_text(encoding="utf-8")


def test_nothing_is_replaced_and_nothing_half_stays(tmp_path: Path) -> None:
    source = lone_weights(tmp_path / "model.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for out, words in (("full", "holds something"), ("model.safetensors", "is a file"), ("full/mine.txt/x", "--out")):
        with pytest.raises(UserError, match=words):
            exported(source, tmp_path / out)
        assert sorted(path.name for path in tmp_path.rglob("*")) == before
    killed, at_work = (tmp_path / f".empty.{pid}.writing" for pid in (99_999_999, os.getppid()))
    for folder in (killed, at_work):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    exported(source, tmp_path / "empty")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == FILES
    assert at_work.exists() and not killed.exists()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "empty").iterdir()}
    assert len(modes) == 1, "whoever may read one file may read all"
