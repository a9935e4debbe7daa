"""Regular expressions of tokenizers as patterns with one meaning in Python and JavaScript.

Tokenizers of Hugging Face split text by regular expressions of Oniguruma, with classes of characters by Unicode's
properties. Other libraries lack these, or follow another version of Unicode. A pattern is a list: text with the same
meaning in Python's `re` and JavaScript, and numbers for classes of characters, which are ranges of code points. The
tokenizer's library itself determines the characters of a class. Expressions without such a form are `Unsupported`.

Syntax: doc/RE and doc/SYNTAX.md of github.com/kkos/oniguruma, ONIG_SYNTAX_RUBY's meaning of quantifiers and anchors.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable

import numpy as np

Part = str | int
ANY = "[\\s\\S]"
# Escapes that are not characters, or that depend on earlier matches.
_NOT_CHARACTERS = frozenset("ABbGgKkRXyYzZONQE123456789")
_QUANTIFIER = re.compile(r"[?*+]|\{(\d*)(?:(,)(\d*))?\}")
# The beginning of a group in an expression, and its beginning in a pattern.
_OPENS = {"(?=": "(?=", "(?!": "(?!", "(?>": "", "(?:": "(?:", "(?i:": "(?:", "(": "(?:"}
# Pairs of letters to which a single character folds too.
_FOLDED = ("ss", "st", "ff", "fi", "fl")
_MOST_DEPTH = 50
_CODES = 0x110000


class Unsupported(Exception):
    """A part of a tokenizer that no table can express; its text ends a sentence about the tokenizer."""


@functools.cache
def all_characters() -> str:
    """All characters: code points without surrogates, which do not occur in text."""
    return "".join(map(chr, [*range(0xD800), *range(0xE000, _CODES)]))


@functools.cache
def _cased() -> str:
    """All characters that have a case: if case is ignored, a letter matches only these."""
    return "".join(character for character in all_characters() if character.lower() != character.upper())


def ranges_of(held: np.ndarray) -> tuple[int, ...]:
    """Converts a set of code points to ascending ranges: first and last of each.

    Args:
        held: the set as bool [0x110000], by code point.
    """
    edges = np.flatnonzero(np.diff(np.concatenate(([False], held, [False])).astype(np.int8)))
    edges[1::2] -= 1
    return tuple(edges.tolist())


def characters_in(text: str) -> np.ndarray:
    """The characters of a text: bool [0x110000], by code point."""
    held = np.zeros(_CODES, bool)
    held[np.frombuffer(text.encode("utf-32-le"), "<u4")] = True
    return held


@functools.lru_cache(256)
def members(expression: str, among: str | None = None) -> tuple[int, ...]:
    """The single characters (or those of a text) that an expression of Oniguruma matches, as ranges.

    Raises:
        Unsupported: if the library rejects the expression.
    """
    from tokenizers import Regex, normalizers  # imported here, as in llamajax.tokenizer

    asked = all_characters() if among is None else among
    try:
        left = normalizers.Replace(Regex(expression), "").normalize_str(asked)
    except Exception:  # the library raises plain Exception
        raise Unsupported(f"has a regular expression that its library does not read ({expression[:40]})") from None
    return ranges_of(characters_in(asked) & ~characters_in(left))


def outside(ends: tuple[int, ...]) -> tuple[int, ...]:
    """The code points that are not in these ranges."""
    begins, last = [0, *(end + 1 for end in ends[1::2])], [*(first - 1 for first in ends[::2]), _CODES - 1]
    return tuple(end for pair in zip(begins, last, strict=True) if pair[0] <= pair[1] for end in pair)


class Patterns:
    """Makes patterns that share classes.

    Attributes:
        classes: the ranges of code points of each class, by its number.
    """

    def __init__(self) -> None:
        """Starts without classes."""
        self.classes: list[tuple[int, ...]] = []

    def of_class(self, ends: tuple[int, ...]) -> int:
        """The number of a class, which is added if it is new."""
        if ends not in self.classes:
            self.classes.append(ends)
        return self.classes.index(ends)

    def of_text(self, text: str) -> list[Part]:
        """A pattern for a text."""
        return [self.of_class((ord(character), ord(character))) for character in text]

    def of_expression(self, expression: str) -> list[Part]:
        """A pattern for a regular expression.

        Raises:
            Unsupported: if no pattern expresses it.
        """
        found = _Parser(expression, self.of_class).parsed()
        if found.empty:
            raise Unsupported(f"has a regular expression that matches nothing at all ({expression[:40]})")
        return _numbered(found.parts)


@dataclasses.dataclass(frozen=True)
class _Found:
    """A part of an expression: its pattern, and whether it matches an empty text too.

    A pair ("(", n) begins group n, and (")", n) refers to it; `_numbered` gives them their final numbers.
    """

    parts: tuple["Part | tuple[str, int]", ...]
    empty: bool


def _numbered(parts: Iterable["Part | tuple[str, int]"]) -> list[Part]:
    """Numbers groups in the order in which they begin."""
    numbers: dict[int, int] = {}
    made: list[Part] = []
    for part in parts:
        if isinstance(part, tuple):
            kind, group = part
            number = numbers.setdefault(group, len(numbers) + 1)
            part = "(" if kind == "(" else f"\\{number}"
        made.append(part)
    joined: list[Part] = []
    for part in made:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


class _Parser:
    """Parses one expression."""

    def __init__(self, expression: str, of_class: Callable[[tuple[int, ...]], int]) -> None:
        self._text, self._at, self._of_class, self._groups, self._depth = expression, 0, of_class, 0, 0

    def parsed(self) -> _Found:
        """Parses the whole expression."""
        found = self._alternatives(ignore_case=False)
        if self._at < len(self._text):
            self._refuse("an unmatched )")
        return found

    def _refuse(self, what: str) -> None:
        raise Unsupported(f"has a regular expression with {what} ({self._text[:40]})")

    def _looking_at(self, text: str) -> bool:
        return self._text.startswith(text, self._at)

    def _alternatives(self, ignore_case: bool) -> _Found:
        """Parses alternatives, up to the end or to the parenthesis that closes them."""
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            self._refuse("groups inside groups")
        some = [self._sequence(ignore_case)]
        while self._looking_at("|"):
            self._at += 1
            some.append(self._sequence(ignore_case))
        self._depth -= 1
        parts = [part for index, found in enumerate(some) for part in (("|",) * (index > 0) + found.parts)]
        return _Found(tuple(parts), any(found.empty for found in some))

    def _sequence(self, ignore_case: bool) -> _Found:
        """Parses a sequence of quantified atoms."""
        parts: list[Part | tuple[str, int]] = []
        empty, letters = True, ""
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            begin = self._at
            found = self._quantified(self._atom(ignore_case))
            source = self._text[begin : self._at]
            letters = letters + source if len(source) == 1 else ""
            if ignore_case:
                self._check_folding(letters)
            parts += found.parts
            empty = empty and found.empty
        return _Found(tuple(parts), empty)

    def _check_folding(self, letters: str) -> None:
        """Refuses letters of which several fold to the same as a single character, which Oniguruma matches too."""
        if any(code >= "\x80" for code in letters) or any(pair in letters.lower() for pair in _FOLDED):
            self._refuse("letters whose cases are not single characters")

    def _atom(self, ignore_case: bool) -> _Found:
        """Parses a character, a class, a group, or a look-ahead."""
        first = self._text[self._at]
        if first == "(":
            return self._group(ignore_case)
        if first == "$":  # matches before the end of any line
            self._at += 1
            return _Found(("(?=", self._of_class((10, 10)), f"|(?!{ANY}))"), True)
        if first in "^*+?":
            self._refuse(first)
        begin = self._at
        self._at += 1
        if first == "[":
            self._skip_class()
        elif first == "\\":
            self._skip_escape()
        elif first != ".":
            ends: tuple[int, ...] = (ord(first), ord(first))
            if ignore_case and first.isalpha():
                ends = members(f"(?i:{first})", _cased())
            return _Found((self._of_class(ends),), False)
        source = self._text[begin : self._at]
        return _Found((self._of_class(members(f"(?i:{source})" if ignore_case else source)),), False)

    def _skip_class(self) -> None:
        """Moves past the bracket that closes a class; classes may be nested."""
        depth, begin = 1, self._at
        while depth:
            if self._at >= len(self._text):
                self._refuse("an unmatched [")
            character = self._text[self._at]
            self._at += 2 if character == "\\" else 1
            first = self._text[begin : self._at - 1] in ("", "^")
            depth += (character == "[") - (character == "]" and not first)

    def _skip_escape(self) -> None:
        """Moves past an escape."""
        rest = re.compile(r"[pP]\{\^?\w+\}|x\{[0-9A-Fa-f]{1,6}\}|x[0-9A-Fa-f]{1,2}|u[0-9A-Fa-f]{4}|[^pPxuc0CM]", re.S)
        found = rest.match(self._text, self._at)
        if found is None or found.group() in _NOT_CHARACTERS:
            self._refuse(f"\\{self._text[self._at : self._at + 1]}")
        else:
            self._at = found.end()

    def _group(self, ignore_case: bool) -> _Found:
        """Parses a group, without capturing its match."""
        begins = next(begins for begins in _OPENS if self._looking_at(begins))
        opens = _OPENS[begins]
        self._at += len(begins)
        if begins == "(" and self._looking_at("?"):
            self._refuse(f"({self._text[self._at : self._at + 3]}")
        inner = self._alternatives(ignore_case or begins == "(?i:")
        if not self._looking_at(")"):
            self._refuse("an unmatched (")
        self._at += 1
        if not opens:
            return self._atomic(inner)
        return _Found((opens, *inner.parts, ")"), inner.empty or opens in ("(?=", "(?!"))

    def _atomic(self, inner: _Found) -> _Found:
        """An atomic group: a look-ahead that captures the match, and a reference to it."""
        self._groups += 1
        return _Found(("(?=", ("(", self._groups), *inner.parts, "))", (")", self._groups)), inner.empty)

    def _quantified(self, atom: _Found) -> _Found:
        """Parses the quantifiers after an atom."""
        plain = len(atom.parts) == 1
        while (found := _QUANTIFIER.match(self._text, self._at)) and self._is_quantifier(found):
            self._at = found.end()
            sign, (least, comma, _) = found.group(), found.groups(default="")
            lazy = self._looking_at("?") and (sign[0] != "{" or bool(comma))
            possessive = self._looking_at("+") and sign[0] != "{"  # after braces, + is one more quantifier
            if sign[0] == "{" and self._looking_at("?") and not comma:
                self._refuse(sign + "?")
            self._at += lazy or possessive
            sign = "{0" + sign[1:] if sign.startswith("{,") else sign
            parts = atom.parts if plain else ("(?:", *atom.parts, ")")
            if atom.empty:
                self._refuse("a quantifier of what may be empty")
            empty = sign[0] in "?*" or (sign[0] == "{" and not int(least or 0))
            atom = _Found((*parts, sign + "?" * lazy), empty)
            atom = self._atomic(atom) if possessive else atom
            plain = False
        return atom

    def _is_quantifier(self, found: re.Match[str]) -> bool:
        least, comma, most = found.groups()
        if not found.group().startswith("{"):
            return True
        return bool(least or (comma and most))
