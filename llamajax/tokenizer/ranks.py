"""Converts Llama 3's tokenizer.model, which holds ranks of byte sequences for tiktoken, to a tokenizer.json.

Each line holds the base64 of a token and its rank, which is its id. The ids after the ranks are 256 special tokens,
which are not in the file. Sources:
`Tokenizer` in models/llama3/tokenizer.py of github.com/meta-llama/llama-models (the regular expression and the special
tokens); `TikTokenConverter` in convert_slow_tokenizer.py of github.com/huggingface/transformers (merges out of ranks).
"""

import base64
import binascii
from collections.abc import Iterable, Mapping

from llamajax.tokenizer.byte_level import characters_of
from llamajax.tokenizer.engine import EngineError
from llamajax.tokenizer.json_form import byte_level_json
from llamajax.tokenizer.pre_tokenizers import PATTERNS
from llamajax.words import AddedToken

# From models/llama3/tokenizer.py. Since Llama 3.1, the reserved tokens 2 to 4 of Llama 3.0 have names.
_NAMED = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"),
    *("<|eot_id|>", "<|python_tag|>", "<|image|>"),
)
SPECIAL = (*_NAMED, *(f"<|reserved_special_token_{2 + i}|>" for i in range(256 - len(_NAMED))))


def json_of_ranks(data: bytes, added: Iterable[AddedToken] = ()) -> bytes:
    """Returns a tokenizer.json that gives tiktoken's ids.

    Args:
        data: the bytes of the file.
        added: the checkpoint's added tokens; they name the ids after the ranks, whose names differ between versions.

    Raises:
        EngineError: for lines that are not ranks, or ranks that are not those of a byte-level vocabulary.
    """
    ranks = _read(data)
    vocabulary = {characters_of(token): rank for token, rank in ranks.items()}
    special, user_defined = _behind(len(ranks), added)
    first = next((text for text, index in special.items() if index == len(ranks)), None)
    return byte_level_json(
        vocabulary,
        merges_of(ranks),
        patterns=PATTERNS["llama-bpe"].expressions,
        ignore_merges=True,
        special=special,
        user_defined=user_defined,
        bos=first,
    )


def _behind(first: int, added: Iterable[AddedToken]) -> tuple[dict[str, int], dict[str, int]]:
    """The ids by text of the tokens after the ranks: special tokens, and others."""
    named = {token.id: token for token in added if token.id >= first}
    texts = {index: token.text for index, token in named.items()}
    for index in range(first, max([first + len(SPECIAL) - 1, *named]) + 1):
        usual = SPECIAL[index - first] if index - first < len(SPECIAL) else ""
        if index not in texts:
            texts[index] = f"<|reserved_token_{index}|>" if usual in ("", *texts.values()) else usual
    special = {text: index for index, text in sorted(texts.items()) if index not in named or named[index].special}
    return special, {text: index for index, text in texts.items() if text not in special}


def _read(data: bytes) -> dict[bytes, int]:
    """Reads the ranks by token.

    Raises:
        EngineError: unless they are 0 to R - 1, each once, with all bytes among the tokens.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (binascii.Error, ValueError):
            raise EngineError(
                f"tiktoken ranks, damaged in line {number}: expected the base64 of a token and its rank"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or b"" in ranks:
        raise EngineError(f"tiktoken ranks that are not 0 to {len(ranks) - 1}, each once: they are damaged")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise EngineError("tiktoken ranks without a token for each byte: they are damaged")
    return ranks


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """The pairs of tokens that merge into a token, in the order of that token's rank."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        pairs = []
        for at in range(1, len(token)):
            left, right = ranks.get(token[:at]), ranks.get(token[at:])
            if left is not None and right is not None:
                pairs.append((left, right, at))
        text = characters_of(token)  # a character for each byte
        merges += [(text[:at], text[at:]) for _, _, at in sorted(pairs)]
    return merges
