"""Encodes a text of trusted parts, which may hold control tokens, and others, which may not."""

import functools
from bisect import bisect_right
from collections.abc import Collection, Sequence

from llamajax.files import shortened
from llamajax.tokenizer.added import AddedPatterns
from llamajax.tokenizer.engine import Engine, EngineError
from llamajax.words import AddedToken


def encode_parts(engine: Engine, parts: Sequence[tuple[str, bool]], control: Collection[str] = ()) -> list[int]:
    """See `Tokenizer.encode_parts`.

    Raises:
        EngineError: if a part that is not trusted holds a control token that the vocabulary cannot spell otherwise.
    """
    known = (*engine.added, *engine.controls)
    guarded = {token.id for token in known if token.special or token.text in control}
    whole, trusted = "".join(text for text, _ in parts), _trusted(parts)
    refused = False

    def counts(token: AddedToken, at: int) -> bool:
        nonlocal refused
        if token.id not in guarded:
            return True
        last = bisect_right(trusted, (at, len(whole))) - 1
        inside = last >= 0 and at + len(token.text) <= trusted[last][1]
        refused = refused or not inside
        return inside

    found = list(_patterns(known).parts(whole, counts))
    controls = guarded - {engine.unk_id}  # an unknown id may also stand for text that the vocabulary lacks
    read = [part for _, part in found if isinstance(part, int) and part in controls]
    if not refused:
        ids = engine.encode(whole, special=True)
        # The engine looks for some tokens in normalized text, and may find more of them than the text itself has.
        if [index for index in ids if index in controls] == read:
            return ids
    ids = []
    for at, part in found:
        ids += [part] if isinstance(part, int) else _spelt(engine, part, at == 0, controls)
    return ids


def _spelt(engine: Engine, text: str, first: bool, controls: Collection[int]) -> list[int]:
    """Encodes a text without control tokens: the text of a control token is cut and its halves encoded apart."""
    ids = engine.spell(text, first)
    named = next((engine.piece(index) for index in ids if index in controls), None)
    if named is None:
        return ids
    cut = text.find(named) + 1
    if not cut or cut == len(text):
        raise EngineError(f"the vocabulary can encode {shortened(named)} only as that token, not as plain text")
    return _spelt(engine, text[:cut], first, controls) + _spelt(engine, text[cut:], False, controls)


@functools.lru_cache(maxsize=4)
def _patterns(tokens: tuple[AddedToken, ...]) -> AddedPatterns:
    return AddedPatterns(tokens)


def _trusted(parts: Sequence[tuple[str, bool]]) -> list[tuple[int, int]]:
    """The start and end of the trusted parts; adjacent parts are merged into one."""
    spans: list[tuple[int, int]] = []
    end = 0
    for text, special in parts:
        start, end = end, end + len(text)
        if special:
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, end))
    return spans
