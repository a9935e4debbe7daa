r"""Extracts the final answer of a text, in one spelling, for the votes of self-consistency.

>>> final_answer("6 packs of 14 make 6 x 14 = 84. The answer is 84 pencils.")
'84'
>>> final_answer(r"So x is \boxed{\frac{1}{2}}."), final_answer("The answer is (B)."), final_answer("$1,000.00")
('0.5', 'B', '1000')
"""

import collections
import re
from fractions import Fraction

# Longer numbers (in characters) are compared as written: arithmetic with them would take long.
_LONGEST_NUMBER = 100
# The number of characters after a mark in which the answer is looked for.
_LONGEST_CLAUSE = 300
_SIGN = r"[-\u2212]?"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![,\d])|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    # A minus after a word or a number is not a sign.
    rf"(?<![\w./])(?P<number>{_SIGN}\$?(?:{_DIGITS}))(?:\s?/\s?(?P<below>\d+)(?![\d./]))?|"
    rf"\\[dt]?frac\s?\{{\s?(?P<top>{_SIGN}\d+)\s?\}}\s?\{{\s?(?P<bottom>\d+)\s?\}}"
)
# Marks of the final answer: "the answer is", "Answer:", and GSM8K's "####".
_MARK = re.compile(r"\banswer(?:\s+is|\s+would\s+be|\s*:|\s*=)+|####", re.IGNORECASE)
_CLAUSE = re.compile(r".*?(?=[.!?](?:\s|$)|$)", re.MULTILINE)
_LETTER = re.compile(r"\(([A-Z])\)|([A-Z])(?=[.):,;]|$)")
_MARKUP = re.compile(r"\*\*|__|\\[()\[\]!,]|\\text\s?\{([^{}]*)\}|`")


def final_answer(text: str) -> str | None:
    r"""Returns the final answer of a text, or None if it has none.

    The answer is the content of the last `\boxed{...}`; else the letter of a choice, the number or the words after the
    last "answer is", "answer:" or "####"; else the last number. Equal numbers are spelt alike: 1,000 and $1000 and
    1000.0 are "1000", 3/4 is "0.75".
    """
    boxed = _last_boxed(text)
    if boxed is not None and (answer := _named(boxed[:_LONGEST_CLAUSE])):
        return answer
    for mark in reversed(list(_MARK.finditer(text))):
        if answer := _named(text[mark.end() : mark.end() + _LONGEST_CLAUSE]):
            return answer
    last = collections.deque(_NUMBER.finditer(text), maxlen=1)
    return _spelt(last[0]) if last else None


def _last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, inner braces included; None if there is none, or it is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    first, depth = start + len("\\boxed{"), 1
    for end in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[first:end]
    return None


def _named(text: str) -> str | None:
    """The answer that a clause names at its beginning."""
    found = _CLAUSE.match(_MARKUP.sub(r"\1", text).lstrip(" \t\n:"))
    clause = found[0].strip() if found else ""
    if letter := _LETTER.match(clause):
        return letter[1] or letter[2]
    # In "6 x 14 = 84 pencils" the answer is the result.
    if numbers := _numbers(clause.rpartition("=")[2]) or _numbers(clause):
        return numbers[0]
    words = re.sub(r"[^\w\s]", "", clause).casefold().split()
    return " ".join(words) or None


def _numbers(text: str) -> list[str]:
    """The numbers of a text, each in one spelling."""
    return [_spelt(found) for found in _NUMBER.finditer(text)]


def _spelt(found: re.Match[str]) -> str:
    """A number as a decimal without needless zeros, or as a fraction if the decimal does not end."""
    top, bottom = found["top"] or found["number"], found["bottom"] or found["below"] or "1"
    top = top.replace("\u2212", "-").replace(",", "").replace("$", "")
    if max(len(top), len(bottom)) > _LONGEST_NUMBER or not int(bottom):
        return found[0]
    value = Fraction(top) / int(bottom)
    rest, places = value.denominator, 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        places = max(places, count)
    if rest > 1:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    sign = "-" if value < 0 else ""
    return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)
