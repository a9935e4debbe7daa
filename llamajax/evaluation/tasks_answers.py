r"""Decides whether a generated text is the right answer, by the rules of lm-evaluation-harness.

Words are compared as the harness's `exact_match` does for TriviaQA, without case, punctuation and white space around
them; articles are ignored, as in its Natural Questions. Numbers are compared by the rules of its gsm8k: "," and "$" and
a final "." are ignored, and `number_match` takes the last number anywhere in the text (the filter "flexible-extract").
Unlike in the harness, numbers are compared by value: 17.0 equals 17.

>>> exact_match("The Eiffel Tower.", ("eiffel tower",)), exact_match(" $1,000.", ("1000",)), exact_match("-5", ("5",))
(True, True, False)
>>> number_match("8 - 7 = 1 cup, so the answer is 1.", ("1",)), number_match("1 or 2", ("1",))
(True, False)
"""

import re
import string
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation

# gsm8k's "flexible-extract": (-?[$0-9.,]{2,})|(-?[0-9]+), of which the last counts.
_NUMBERS = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(text: str, answers: Iterable[str]) -> bool:
    """Whether the whole text is one of the answers."""
    for answer in answers:
        value = as_number(answer)
        if (value is not None and as_number(text) == value) or (value is None and _words(text) == _words(answer)):
            return True
    return False


def number_match(text: str, answers: Iterable[str]) -> bool:
    """Whether the last number of a text is one of the answers."""
    found = _NUMBERS.findall(text)
    value = as_number(found[-1]) if found else None
    return value is not None and value in [as_number(answer) for answer in answers]


def as_number(text: str) -> Decimal | None:
    """The number that a text is, or None."""
    digits = text.strip().replace(",", "").replace("$", "").removesuffix(".")
    if not re.fullmatch(r"-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)", digits):
        return None
    try:
        return Decimal(digits)
    except InvalidOperation:  # more digits than Decimal supports
        return None


def _words(text: str) -> str:
    """A text without case, punctuation, articles and needless white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())
