"""The model card of an exported model: what it is, what it was trained on and how, and what not to expect of it."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gpt2ds import __version__
from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.runlog.markdown import fence, safe, table
from gpt2ds.runlog.metrics import History, duration, number, perplexity

if TYPE_CHECKING:
    from gpt2ds.training.manifest import Position

HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- gpt2ds
---
"""

USE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer("Fruits are good for you because", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids)[0]))
```

Or `gpt2ds generate FOLDER "Fruits are good for you because"`. All weights are safetensors: loading them runs no code.
"""


def model_card(
    config: GPT2Config,
    *,
    dtype: str,
    plan: dict[str, Any],
    history: History | None,
    position: "Position | None",
) -> str:
    """The card as Markdown; what plan and history do not say is left out.

    plan: the sections of plan.json. position: where the run stood at these weights, None without a run.
    """
    name = str(_section(plan, "run").get("name") or config.name)
    data = _section(plan, "data")
    trained_on = f" on the text “{safe(str(data['name']))}”" if data.get("name") else ""
    model = [
        ("Parameters", f"{config.parameters:,}"),
        ("Layers, width, heads", f"{config.n_layers}, {config.emb_dim}, {config.n_heads}"),
        ("Context", f"{config.context_length:,} tokens"),
        ("Vocabulary", f"{config.vocab_size:,}, GPT-2's byte-pair encoding"),
        ("Query, key and value bias", "yes" if config.qkv_bias else "none (zeros in the file)"),
        ("Dropout in training", f"{config.drop_rate:g}"),
        ("Weights stored in", dtype),
    ]
    training = [*_progress(config, history, position), *_data(data), *_settings(plan)]
    lines = [
        *(HEAD + f"\n# {safe(name)}").split("\n"),
        "",
        f"A GPT-2 of {config.parameters:,} parameters ({safe(config.name)}), trained from scratch{trained_on} with "
        f"gpt2ds {__version__}.",
        "",
        *table(("model", ""), model),
        "",
    ]
    lines += ["## Training", "", *table(("", ""), training), ""] if training else []
    lines += [*_sample(history, position), *USE.split("\n"), *_limits(config, data)]
    return "\n".join(lines) + "\n"


def _progress(config: GPT2Config, history: History | None, position: "Position | None") -> Iterable[tuple[str, str]]:
    if position is None:
        return
    yield "Optimizer steps", f"{position.step:,}"
    seen = position.sequences_seen * config.context_length
    yield "Tokens seen", f"{seen:,} ({position.sequences_seen:,} sequences), {seen / config.parameters:.3g} a parameter"
    losses = [(record["step"], number(record, "val_loss")) for record in history.evaluations] if history else []
    known = [(step, loss) for step, loss in losses if step <= position.step and math.isfinite(loss)]
    if known:
        step, loss = known[-1]
        where = "" if step == position.step else f", at step {step:,}"
        yield "Validation loss", f"{loss:.4f} nats a token (perplexity {perplexity(loss):,.2f}){where}"
    yield "Training time", duration(position.elapsed_seconds)


def _data(data: dict[str, Any]) -> Iterable[tuple[str, str]]:
    if data.get("name"):
        yield "Data", safe(str(data["name"]))
    if data.get("digest"):
        yield "Digest of the data", safe(str(data["digest"]))
    for field, title in (("train_tokens", "Training text"), ("val_tokens", "Validation text")):
        if math.isfinite(count := number(data, field)):
            yield title, f"{count:,.0f} tokens"


def _settings(plan: dict[str, Any]) -> Iterable[tuple[str, str]]:
    batch, deepspeed = _section(plan, "batch"), _section(plan, "deepspeed")
    optimizer, schedule, devices = (_section(plan, name) for name in ("optimizer", "schedule", "devices"))
    rows = (
        ("Sequences a step", batch, "global_batch"),
        ("Tokens a step", batch, "tokens_per_step"),
        ("Ranks", batch, "ranks"),
        ("Precision", deepspeed, "dtype"),
        ("ZeRO stage", deepspeed, "zero_stage"),
        ("Gradient clipping", deepspeed, "gradient_clipping"),
        ("Peak learning rate", optimizer, "peak_lr"),
        ("AdamW's betas", optimizer, "betas"),
        ("Weight decay", optimizer, "weight_decay"),
        ("Learning rate schedule", schedule, "kind"),
        ("Warm-up steps", schedule, "warmup_steps"),
        ("Seed", _section(plan, "run"), "seed"),
        ("Trained on", devices, "name"),
    )
    for title, section, field in rows:
        if (value := section.get(field)) is not None:
            grouped = isinstance(value, int) and not isinstance(value, bool) and field != "seed"
            yield title, f"{value:,}" if grouped else safe(str(value))


def _sample(history: History | None, position: "Position | None") -> list[str]:
    if history is None or position is None:
        return []
    samples = [record for record in history.samples if record["step"] <= position.step]
    if not samples:
        return []
    prompt, text = (str(samples[-1].get(part, "")) for part in ("prompt", "text"))
    quoted = fence(prompt + text.removeprefix(prompt), "text")
    return [f"## What it wrote at step {samples[-1]['step']:,}", "", *quoted, ""]


def _limits(config: GPT2Config, data: dict[str, Any]) -> list[str]:
    lines = [
        "## Limits",
        "",
        "- It continues text. It was not taught to follow instructions or to tell the truth, and nothing filters what",
        "  it writes.",
        "- It knows only its training text, and may repeat passages of it, with its errors, opinions and names.",
        f"- It sees at most {config.context_length:,} tokens at once.",
        "- The validation loss is that of this text under this tokenizer; it cannot be compared with other texts'.",
    ]
    tokens = number(data, "train_tokens")
    if tokens < 20 * config.parameters:
        lines += [
            f"- Its training text has {tokens / config.parameters:.2g} tokens a parameter. About 20 are held to be",
            "  best (arXiv 2203.15556), so a larger text would make a better model of this size.",
        ]
    return [*lines, "- What the licence of its training text means for it is for its publisher to say."]


def _section(plan: dict[str, Any], name: str) -> dict[str, Any]:
    section = plan.get(name)
    return section if isinstance(section, dict) else {}
