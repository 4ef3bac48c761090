"""DeepSpeed profiles with mistakes: shipped ones changed by chance, and files that are none."""

import copy
import json
import math
from typing import Any

from hypothesis import strategies as st
from support import PROFILES

from gpt2ds.ds_keys import SECTIONS

SHIPPED = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(PROFILES.glob("*.json"))}
Place = tuple[str, ...]


def places(content: Any, at: Place = ()) -> list[tuple[Place, Any]]:
    """Every key of a JSON object and of those in it, with its value."""
    found: list[tuple[Place, Any]] = []
    for key, value in content.items():
        found.append(((*at, key), value))
        if isinstance(value, dict):
            found += places(value, (*at, key))
    return found


def section_of(content: dict[str, Any], at: Place) -> dict[str, Any]:
    for key in at:
        content = content[key]
    return content


def wrong_values(value: Any) -> list[Any]:
    """Values that are no mere other setting of a key that now has this one."""
    if isinstance(value, bool):
        return [[], {}, 7, "maybe", [True], {"enabled": True}]
    if isinstance(value, int | float):
        return [[], {}, "many", [value], {"value": value}, True, -1, math.nan, math.inf, -math.inf, 10**30, str(value)]
    if isinstance(value, str):
        return [[], {}, 7, [value], False]
    if isinstance(value, list):
        return [{}, 7, "x", [*value, 0.5], value[:1], [str(item) for item in value], [2, 3], [[], []]]
    return [[], 7, "x", True, [value]]


@st.composite
def broken_profiles(draw: st.DrawFn) -> str:
    """The text of a shipped profile with one or two mistakes in it."""
    profile = copy.deepcopy(SHIPPED[draw(st.sampled_from(sorted(SHIPPED)))])
    kind = draw(st.sampled_from(["value", "typo", "unknown", "both", "text"]))
    if kind in ("value", "both"):
        at, value = draw(st.sampled_from(places(profile)))
        section_of(profile, at[:-1])[at[-1]] = draw(st.sampled_from(wrong_values(value)))
    if kind in ("typo", "both"):
        at, value = draw(st.sampled_from(places(profile)))
        section, known = section_of(profile, at[:-1]), SECTIONS[".".join(at[:-1])].keys if at[0] != "gpt2ds" else {}
        where = draw(st.integers(0, len(at[-1]) - 1))
        key = at[-1][:where] + draw(st.sampled_from(["", "_", "X", "ü", at[-1][where] * 2])) + at[-1][where + 1 :]
        if key == at[-1] or key in known or key in section:
            key += "_x"
        section[key] = section.pop(at[-1])
    if kind == "unknown":
        names = st.text(st.characters(codec="utf-8"), max_size=30).map(lambda text: f"zz {text}")
        section = section_of(profile, draw(st.sampled_from([(), ("gpt2ds",), ("optimizer",), ("optimizer", "params")])))
        section[draw(names)] = draw(st.sampled_from([1, None, "x", [], {}, True]))
    text = json.dumps(profile, indent=draw(st.sampled_from([None, 2])), ensure_ascii=draw(st.booleans()))
    if kind == "text":
        text = text[: draw(st.integers(0, len(text) - 1))]
    return text


ZERO2 = json.dumps(SHIPPED["zero2"])
NO_PROFILES: dict[str, bytes] = {
    "empty": b"",
    "white": b" \n\t",
    "null": b"null",
    "a number": b"3",
    "a string": b'"zero2"',
    "a list": b"[" + ZERO2.encode() + b"]",
    "binary": bytes(range(256)) * 40,
    "zeros": bytes(10_000),
    "utf-16": ZERO2.encode("utf-16"),
    "latin-1": ZERO2.replace("bf16 with", "für").encode("latin-1"),
    "half a character": ZERO2.encode() + b"\xe4\xb8",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep value": b'{"bf16": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "huge number": ZERO2.replace('"gradient_clipping": 1.0', f'"gradient_clipping": {"9" * 10_000}').encode(),
    "huge float": ZERO2.replace('"gradient_clipping": 1.0', '"gradient_clipping": 1e999').encode(),
    "a key twice": ZERO2.replace("{", '{"gradient_clipping": 2.0, ', 1).encode(),
    "a section twice": ZERO2.replace("{", '{"bf16": {"enabled": false}, ', 1).encode(),
    "a comment": ZERO2.replace("{", "{ // mine\n", 1).encode(),
    "a comma too many": ZERO2.replace("}", ",}", 1).encode(),
    "single quotes": ZERO2.replace('"', "'").encode(),
    "two objects": (ZERO2 * 2).encode(),
    "yaml": b"bf16:\n  enabled: true\n",
    "escape sequences": ZERO2.replace("gradient_clipping", "\\u001b[31mred\\u0007").encode(),
    "a million keys": json.dumps({f"key{number}": 1 for number in range(100_000)}).encode(),
    "a long key": json.dumps({"k" * 1_000_000: 1}).encode(),
    "a long value": json.dumps({"gradient_clipping": "9" * 1_000_000}).encode(),
    "a lone surrogate": b'{"\\ud800": 1}',
    "a surrogate as value": b'{"train_micro_batch_size_per_gpu": "\\udfff"}',
}


# The same for JSON files of other kinds.
TEXTS: dict[str, bytes] = {
    name: content for name, content in NO_PROFILES.items() if not name.startswith(("a ", "single"))
}
TEXTS |= {"no field": b"{}", "infinite": b'{"format_version": Infinity}', "not a number": b"NaN"}
