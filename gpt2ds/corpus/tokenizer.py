"""GPT-2's byte-pair encoding, built from the ranks file shipped beside this module: no network, and refused if the
file is not the real one.

The file is OpenAI's (MIT) as openai-whisper 20250625 packages it; it is byte for byte tiktoken's own `r50k_base`.
"""

import base64
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2ds.errors import UserError

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50256
VOCAB_SIZE = 50257
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
RANKS_PATH = Path(__file__).with_name("gpt2.tiktoken")

# How GPT-2 cuts text before merging bytes, in the possessive form that tiktoken uses for r50k_base (the same pieces,
# no backtracking).
_PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def read_ranks(path: Path = RANKS_PATH) -> dict[bytes, int]:
    """Token bytes -> rank for the 50,256 merges. UserError if the file is missing or its sha256 is not RANKS_SHA256."""
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise UserError(
            f"the GPT-2 ranks file {path.name} cannot be read ({problem.strerror}): reinstall gpt2ds"
        ) from problem
    if hashlib.sha256(content).hexdigest() != RANKS_SHA256:
        raise UserError(
            f"the GPT-2 ranks file {path.name} is damaged (its sha256 is not {RANKS_SHA256[:8]}...): reinstall gpt2ds"
        )
    pairs = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


@functools.cache
def load_tokenizer() -> "tiktoken.Encoding":
    """tiktoken's `gpt2` (vocabulary 50,257), made once per process in about 0.1 s."""
    import tiktoken

    return tiktoken.Encoding(
        name="gpt2",
        pat_str=_PIECES,
        mergeable_ranks=read_ranks(),
        special_tokens={END_OF_TEXT: END_OF_TEXT_ID},
        explicit_n_vocab=VOCAB_SIZE,
    )
