"""Finds added tokens in a text by the rules of Hugging Face's tokenizers library, for engines that do not know them."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from llamajax.words import AddedToken

Counts = Callable[[AddedToken, int], bool]


class AddedPatterns:
    """Finds added tokens: first those that are not normalized, then the others between them."""

    def __init__(self, tokens: Iterable[AddedToken]):
        """Compiles a pattern for each of the two groups."""
        tokens = list(tokens)
        self._patterns = []
        for normalized in (False, True):
            by_text = {token.text: token for token in tokens if token.normalized is normalized}
            if by_text:
                # Of the tokens that begin at the same place, the longest is found first.
                longest_first = sorted(by_text, key=len, reverse=True)
                self._patterns.append((re.compile("|".join(map(re.escape, longest_first))), by_text))

    def parts(self, text: str, counts: Counts = lambda token, at: True) -> Iterator[tuple[int, str | int]]:
        """Splits a text into ids of added tokens and the text between them, each with its position in the text.

        Args:
            text: the text to search.
            counts: whether a token that was found at a position counts as that token; if not, it is text.
        """
        parts: list[tuple[int, str | int]] = [(0, text)]
        for pattern, tokens in self._patterns:
            parts = [
                found
                for at, part in parts
                for found in ([(at, part)] if isinstance(part, int) else _split(at, part, pattern, tokens, counts))
            ]
        return ((at, part) for at, part in parts if part != "")


def _matches(
    at: int, text: str, pattern: re.Pattern[str], tokens: Mapping[str, AddedToken], counts: Counts
) -> Iterator[tuple[AddedToken, int, int]]:
    """Tokens that count, each with its start and end; a token that does not count hides no other that overlaps it."""
    found = pattern.search(text)
    while found:
        start = found.start()
        here = [found.group()]
        if not counts(tokens[here[0]], at + start):
            shorter = [each for each in tokens if len(each) < len(here[0]) and text.startswith(each, start)]
            here = [each for each in sorted(shorter, key=len, reverse=True) if counts(tokens[each], at + start)][:1]
        for each in here:
            yield tokens[each], start, start + len(each)
        found = pattern.search(text, start + (len(here[0]) if here else 1))


def _split(
    at: int, text: str, pattern: re.Pattern[str], tokens: Mapping[str, AddedToken], counts: Counts
) -> Iterator[tuple[int, str | int]]:
    """Splits text at added tokens, as Hugging Face's tokenizers does (`find_matches` in added_vocabulary.rs)."""
    done = 0
    for token, start, end in _matches(at, text, pattern, tokens, counts):
        if token.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[end : end + 1])):
            continue
        start = max(start, done)
        while token.lstrip and start > done and text[start - 1].isspace():
            start -= 1
        while token.rstrip and end < len(text) and text[end].isspace():
            end += 1
        if done < start:
            yield at + done, text[done:start]
        yield at + start, token.id
        done = end
    if done < len(text):
        yield at + done, text[done:]


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"
