"""Stand-ins: characters of Unicode's private planes that replace the characters of messages.

A rendering with stand-ins shows for each character whether the template wrote it or a message. This module belongs to
the worker (`jinja_worker`), and imports the standard library alone.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

# The range of stand-ins. Different strings get different alphabets of stand-ins, as far as there are enough.
_PRIVATE = range(0xF0000, 0x10FFFE)
_MOST_ALPHABETS = 64
# Neutral characters, which have no stand-ins, because templates and JSON treat them specially.
_NEUTRAL = r'\s"\\\x00-\x1f\x7f'


class TooMuchError(Exception):
    """A limit was exceeded; the text completes a sentence that begins with "its chat template"."""


class StandIns:
    """Alphabets of stand-ins for the characters of a request."""

    def __init__(self, texts: Iterable[str], avoided: Iterable[str]):
        """Chooses stand-ins that occur neither in `texts` nor in `avoided`.

        Raises:
            TooMuchError: if there are not enough.
        """
        characters = set().union(*texts)
        if len(characters) > len(_PRIVATE) // 2:
            raise TooMuchError(f"gets {len(characters)} different characters, more than can be told apart")
        characters |= {other for each in characters for other in f"{each.lower()}{each.upper()}{each.title()}"}
        self.real = "".join(sorted(re.sub(f"[{_NEUTRAL}]", "", "".join(characters))))
        self._index = {ord(character): i for i, character in enumerate(self.real)}
        private = re.compile(f"[{chr(_PRIVATE.start)}-{chr(_PRIVATE.stop - 1)}]")
        taken = sorted({ord(c) for text in (self.real, *avoided) for c in private.findall(text)})
        edges = [_PRIVATE.start - 1, *taken, _PRIVATE.stop]
        room, self.start = max((b - a - 1, a + 1) for a, b in zip(edges, edges[1:], strict=False))
        size = max(len(self.real), 1)
        self.alphabets = min(room // size, _MOST_ALPHABETS)
        if not self.alphabets:
            raise TooMuchError(f"gets {size} different characters, more than can be told apart")
        self._back = {self.start + i: self.real[i % size] for i in range(self.alphabets * len(self.real))}

    def marked(self, text: str, number: int) -> "Content":
        """The text in the stand-ins of alphabet `number`."""
        start = self.start + number % self.alphabets * len(self.real)
        return Content(text.translate({code: start + i for code, i in self._index.items()}))

    def plain(self, text: str) -> str:
        """The text that stand-ins stand for."""
        return text.translate(self._back)

    def spans(self, text: str) -> Iterator[tuple[str, bool]]:
        """Splits a rendering into runs of one alphabet, neutral characters within them included, and other text."""
        end = 0
        for begin, after in self._runs(text):
            if end < begin:
                yield text[end:begin], False
            yield self.plain(text[begin:after]), True
            end = after
        if end < len(text):
            yield text[end:], False

    def _runs(self, text: str) -> Iterator[tuple[int, int]]:
        """The start and end of each run of one alphabet."""
        if not self._back:
            return
        size, marks = len(self.real), f"{chr(self.start)}-{chr(self.start + len(self._back) - 1)}"
        for found in re.finditer(f"[{marks}](?:[{marks}{_NEUTRAL}]*[{marks}])?", text):
            run = found.group()
            numbers = [(ord(end(run)) - self.start) // size for end in (self._least, max)]
            if numbers[0] == numbers[1]:
                yield found.span()
                continue
            begin = found.start()  # of several alphabets
            places = (at for at in range(begin, found.end()) if ord(text[at]) >= self.start)
            for _, group in itertools.groupby(places, lambda at: (ord(text[at]) - self.start) // size):
                one = list(group)
                yield one[0], one[-1] + 1

    def _least(self, run: str) -> str:
        """The least stand-in of a run; neutral characters, which are less than any stand-in, do not count."""
        return min(filter(chr(self.start).__le__, set(run)))

    def like(self, character: str, stand_in: str) -> str:
        """The stand-in of `character` in the alphabet of `stand_in`; `character` itself if there is none."""
        index = self._index.get(ord(character))
        if index is None or ord(stand_in) not in self._back:
            return character
        return chr(ord(stand_in) - (ord(stand_in) - self.start) % len(self.real) + index)


_now: StandIns  # the stand-ins of the current request


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return _now.plain(value) if isinstance(value, str) else value


class Content(str):
    """A text of stand-ins that compares, splits and strips like the text that they stand for.

    Operations of plain `str`, such as `"".join`, keep the stand-ins, so they are never lost. A comparison of such a
    result may come out differently; then the rendering differs from that of the plain text, which shows it.
    """

    __slots__ = ()

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        plain = _plain(self)
        quote = repr(plain)[0]
        pairs = [(mark, "\\'" if c == quote == "'" else repr(c)[1:-1]) for mark, c in zip(str.__iter__(self), plain)]  # noqa: B905
        return quote + "".join(mark if len(shown) == 1 else shown for mark, shown in pairs) + quote

    def __hash__(self) -> int:
        return hash(_plain(self))

    def __iter__(self) -> Iterator[str]:
        return map(Content, str.__iter__(self))

    def __getitem__(self, index: Any) -> "Content":
        return Content(str.__getitem__(self, index))

    def __add__(self, other: str) -> "Content":
        return Content(str.__add__(self, other))

    def __radd__(self, other: str) -> "Content":
        return Content(str.__add__(other, self))

    def split(self, separator: Any = None, maxsplit: Any = -1) -> Any:
        return self._cut(_plain(self).split(_plain(separator), maxsplit), separator)

    def rsplit(self, separator: Any = None, maxsplit: Any = -1) -> Any:
        return self._cut(_plain(self).rsplit(_plain(separator), maxsplit), separator)

    def _cut(self, pieces: list[str], separator: str | None) -> list["Content"]:
        """Cuts the pieces of the plain text, in order, out of this text."""
        plain, at, cut = _plain(self), 0, []
        for piece in pieces:
            at = plain.index(piece, at) if separator is None else at
            cut.append(self[at : at + len(piece)])
            at += len(piece) + len(separator or "")
        return cut

    def splitlines(self, keepends: bool = False) -> Any:
        return list(map(Content, str.splitlines(self, keepends)))

    def partition(self, separator: str) -> Any:
        at = self.find(separator)
        end = at + len(separator)
        return (self, "", "") if at < 0 else (self[:at], self[at:end], self[end:])

    def rpartition(self, separator: str) -> Any:
        at = self.rfind(separator)
        end = at + len(separator)
        return ("", "", self) if at < 0 else (self[:at], self[at:end], self[end:])

    def replace(self, old: Any, new: Any, count: Any = -1) -> Any:
        if old == "":
            return Content(str.replace(self, old, new, count))
        return Content(str.join(new, self.split(old, count)))

    def lstrip(self, characters: Any = None) -> Any:
        return self[len(self) - len(_plain(self).lstrip(_plain(characters))) :]

    def rstrip(self, characters: Any = None) -> Any:
        return self[: len(_plain(self).rstrip(_plain(characters)))]

    def strip(self, characters: Any = None) -> Any:
        plain, characters = _plain(self), _plain(characters)
        begin = len(plain) - len(plain.lstrip(characters))
        return self[begin : max(len(plain.rstrip(characters)), begin)]

    def removeprefix(self, prefix: str) -> Any:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> Any:
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self


def _as_plain(name: str) -> Any:
    """A method that answers for the text that the stand-ins stand for."""
    method = getattr(str, name)

    def answer(self: Content, *arguments: Any) -> Any:
        return method(_plain(self), *map(_plain, arguments))

    return answer


def _as_case(name: str) -> Any:
    """A method that changes the case of letters."""
    method = getattr(str, name)

    def changed(self: Content) -> str:
        made, marks = method(_plain(self)), list(str.__iter__(self))
        if len(made) != len(marks):  # for example, ß becomes SS
            each = [method(character) for character in _plain(self)]
            marks = [mark for mark, texts in zip(marks, each, strict=True) for _ in texts]
        return Content("".join(map(_now.like, made, marks))) if len(made) == len(marks) else method(self)

    return changed


for _name in (
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__contains__", "startswith", "endswith", "find"),
    *("rfind", "index", "rindex", "count", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier"),
    *("islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper"),
):
    setattr(Content, _name, _as_plain(_name))
for _name in ("lower", "upper", "title", "capitalize", "casefold", "swapcase"):
    setattr(Content, _name, _as_case(_name))


def begin(value: Any, avoided: Iterable[str]) -> StandIns:
    """Chooses stand-ins for all texts of a value; `Content` uses them from then on.

    Raises:
        TooMuchError: if there are not enough.
    """
    global _now
    _now = StandIns(_texts(value), avoided)
    return _now


def marked(value: Any, numbers: Iterator[int] | None = None) -> Any:
    """The value with all texts in stand-ins; keys of objects are replaced only if they are not identifiers."""
    numbers = itertools.count() if numbers is None else numbers
    if isinstance(value, str):
        return _now.marked(value, next(numbers))
    if isinstance(value, list):
        return [marked(each, numbers) for each in value]
    if isinstance(value, dict):
        return {(key if key.isidentifier() else marked(key, numbers)): marked(value[key], numbers) for key in value}
    return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for each in value:
            yield from _texts(each)
        if isinstance(value, dict):
            yield from _texts(list(value.values()))
