"""Regular expressions of tokenizers, translated for Python's `re`, against the library that they were written for."""

import unicodedata

import pytest
from tokenizers import Regex, pre_tokenizers

from export.patterns import Patterns, Unsupported, members, outside
from export.runners.text import Text
from llamajax.tokenizer.pre_tokenizers import PATTERNS
from tests.encoded import drawn_texts

EXPRESSIONS = sorted({expression for made in PATTERNS.values() for expression in made.expressions})
# tiktoken's expression, and other corners of the syntax.
EXPRESSIONS += [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"(?>a|ab)c|(?:a++b)*+c|x{,2}y|z{2,}|\d{2}",
    r"\S+?(?= )|[a-z&&[^aeiou]]+|[[:upper:]]|[^]x]|\x{e9}|\u00e9|\.|{|a{|b{,}",
    r"(?i:[a-c]é?|once)|.",
    r"(\p{Lu})(\p{Ll}|\p{M})+| $|\p{^L}",
]


def split_by(expression: str, behavior: str = "isolated", invert: bool = False):
    """Returns the runners' split step for an expression."""
    patterns = Patterns()
    text = Text.__new__(Text)
    pattern = patterns.of_expression(expression)
    text.classes = patterns.classes
    return text.step_split(pattern, behavior, invert)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_splits_where_the_library_does(expression: str) -> None:
    texts = [text for text in [*drawn_texts(400, 7), "xyzzz zz aab abc xxy {a{b{ OnCE éÉ ]x \n  \n end  "] if text]
    for behavior, invert in [("isolated", False), ("merged_with_previous", True), ("contiguous", False)]:
        theirs, ours = pre_tokenizers.Split(Regex(expression), behavior, invert), split_by(expression, behavior, invert)
        expected = [[part for part, _ in theirs.pre_tokenize_str(text)] for text in texts]
        assert [ours([text], True) for text in texts] == expected


def test_classes_are_the_librarys() -> None:
    """The library's letters differ from this Python's, whose version of Unicode is another."""
    letters = members(r"\p{L}")
    assert letters[:4] == (ord("A"), ord("Z"), ord("a"), ord("z"))
    held = {code for first, last in zip(letters[::2], letters[1::2], strict=True) for code in range(first, last + 1)}
    ours = {code for code in range(0x110000) if unicodedata.category(chr(code))[0] == "L"}
    assert not ours - held and all(unicodedata.category(chr(code)) == "Cn" for code in held - ours)
    assert outside(outside(letters)) == letters and members(r"\P{L}")[-1] == 0x10FFFF


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        (r"a(?<=b)", r"\(\?<=: "),
        (r"(?<name>a)", r"\(\?<n"),
        (r"(?i)a", r"\(\?i\)"),
        (r"\bword", r"\\b"),
        (r"(a)\1", r"\\1"),
        (r"^a", r"\^"),
        (r"a{2}?", r"\{2\}\?"),
        (r"(?:a*)+", "a quantifier of what may be empty"),
        (r"a*", "matches nothing at all"),
        (r"(?i:straße)", "letters whose cases are not single characters"),
        (r"(?i:first)", "letters whose cases are not single characters"),
        (r"(a", r"an unmatched \("),
        (r"a)", r"an unmatched \)"),
        (r"[a", r"an unmatched \["),
        (r"\p{Nonsense}", "that its library does not read"),
        ("(" * 100 + "a" + ")" * 100, "groups inside groups"),
    ],
)
def test_what_would_mean_something_else_is_refused(expression: str, fault: str) -> None:
    with pytest.raises(Unsupported, match=f"has a regular expression (with )?.*{fault.removesuffix(': ')}") as error:
        Patterns().of_expression(expression)
    assert "\n" not in str(error.value) and len(str(error.value)) < 120


def test_a_long_text_is_split_in_time() -> None:
    ours, text = split_by(EXPRESSIONS[-5]), "a" * 20000 + " " * 20000 + "1" * 20000 + "\u0301" * 20000
    assert "".join(ours([text], True)) == text
    assert ours(["12345"], True) == ["12345"]  # "{1,3}+" is Oniguruma's quantifier of a quantifier
