"""Streamed text: stop strings are held back and cut, characters stay whole, pieces add up.

The model here recites: its weights are written so that it says a given text, byte token by byte token. So every
expected text below is known beforehand.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llamajax
from llamajax import Llama, Tokenizer, abstract_model, generate, stream
from llamajax.generation.programs import DECODE_BLOCK
from llamajax.generation.request import Row

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
PRINTABLE = "".join(map(chr, range(33, 127)))
EOS = 2

Recite = Callable[..., Llama]


def _bytes(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


@pytest.fixture(scope="module")
def recite(tiny_tokenizer: Tokenizer) -> Recite:
    """Builds a model that says `text` after a BOS and then `end`; no byte of `text` may come twice.

    Embeddings are one-hot, the layers add nothing, and the head sends each token to the one that follows it.
    """
    V = tiny_tokenizer.vocab_size
    config = llamajax.Config(
        vocab_size=V, width=V, ffn_width=2, num_layers=1, num_heads=1, num_kv_heads=1, head_size=2, context_length=512
    )
    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_model(config))

    def build(text: str, end: int = EOS) -> Llama:
        ids = [1, *_bytes(text), end]
        assert len(set(ids[:-1])) == len(ids) - 1
        head_VD = np.zeros((V, V), np.float32)
        head_VD[ids[1:], ids[:-1]] = 100.0
        model = jax.tree.map(lambda leaf: leaf, blank)
        model.embed_VD.set_value(jnp.eye(V))
        model.norm.weight_D.set_value(jnp.ones(V))
        model.head_VD.set_value(jnp.asarray(head_VD))
        return model

    return build


def _pieces(model: Llama, tokenizer: Tokenizer, **options) -> tuple[list[str], llamajax.Completion]:
    run = stream(model, tokenizer, [1], temperature=0, **options)
    pieces = list(run)
    return pieces, run.completions[0]


def test_it_recites(recite: Recite, tiny_tokenizer: Tokenizer) -> None:
    pieces, completion = _pieces(recite(ALPHABET), tiny_tokenizer)
    assert "".join(pieces) == completion.text == ALPHABET
    assert completion.tokens == _bytes(ALPHABET), "tokens end before the stop token"
    assert len(completion.log_probabilities) == 26
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize("text", ["é🙂語", "🙂", "語é"])
def test_characters_come_whole(text: str, recite: Recite, tiny_tokenizer: Tokenizer) -> None:
    pieces, completion = _pieces(recite(text), tiny_tokenizer)
    assert "".join(pieces) == completion.text == text
    assert all(set(piece) <= set(text) for piece in pieces)


@pytest.mark.parametrize("smooth", [True, False])
def test_a_character_cut_by_the_limit_is_replaced(smooth: bool, recite: Recite, tiny_tokenizer: Tokenizer) -> None:
    pieces, completion = _pieces(recite("ab🙂"), tiny_tokenizer, max_new_tokens=4, smooth=smooth)
    assert "".join(pieces) == completion.text == "ab\N{REPLACEMENT CHARACTER}"
    assert (len(completion.tokens), completion.finish_reason) == (4, "length")


# ---- Stop strings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ("hij", "abcdefg", 10),
        ("a", "", 1),
        (["xyz", "cd", "bcde"], "ab", 4),  # "cd" is complete before "bcde"
        (["cde", "de"], "ab", 5),  # both are complete at once: the earlier beginning counts
        (["zz", "never"], ALPHABET, 26),
        ("yz!", ALPHABET, 26),  # held back until the end, then shown
        ("z", ALPHABET[:-1], 26),
    ],
)
@pytest.mark.parametrize("smooth", [True, False])
def test_stop_strings(stop, text: str, tokens: int, smooth: bool, recite: Recite, tiny_tokenizer: Tokenizer) -> None:
    pieces, completion = _pieces(recite(ALPHABET), tiny_tokenizer, stop=stop, smooth=smooth)
    assert completion.text == text
    assert "".join(pieces) == text
    assert completion.tokens == _bytes(ALPHABET)[:tokens], "tokens include the ids that spell the stop string"
    assert len(completion.log_probabilities) == tokens
    assert completion.finish_reason == "stop"


def test_what_may_become_a_stop_string_is_held_back(tiny_tokenizer: Tokenizer) -> None:
    """After every token, exactly the text is shown that cannot become part of a stop string."""
    stops = ["cdeX", "hij"]
    row = Row([1], tiny_tokenizer, tuple(stops))
    shown, seen = "", []
    for token in _bytes(ALPHABET[:10]):
        shown += row.take(np.array([token]), np.zeros(1), False)[0]
        seen.append(shown)
    assert seen == ["a", "ab", "ab", "ab", "ab", "abcdef", "abcdefg", "abcdefg", "abcdefg", "abcdefg"]
    assert row.finish_reason == "stop"


def test_held_back_text_is_released_at_the_limit(recite: Recite, tiny_tokenizer: Tokenizer) -> None:
    pieces, completion = _pieces(recite(ALPHABET), tiny_tokenizer, stop="cdX", max_new_tokens=4)
    assert "".join(pieces) == completion.text == "abcd"
    assert completion.finish_reason == "length"


def test_stop_string_across_blocks(recite: Recite, tiny_tokenizer: Tokenizer) -> None:
    """`generate` takes blocks of 64 tokens; this stop string begins in the first and ends in the second."""
    stop = PRINTABLE[DECODE_BLOCK - 2 : DECODE_BLOCK + 3]
    pieces, completion = _pieces(recite(PRINTABLE), tiny_tokenizer, stop=stop, smooth=False)
    assert pieces == [PRINTABLE[: DECODE_BLOCK - 2], ""]
    assert completion.text == PRINTABLE[: DECODE_BLOCK - 2]
    assert len(completion.tokens) == DECODE_BLOCK + 3


def test_stop_string_of_several_bytes_a_character(recite: Recite, tiny_tokenizer: Tokenizer) -> None:
    pieces, completion = _pieces(recite("a語🙂z"), tiny_tokenizer, stop="🙂")
    assert "".join(pieces) == completion.text == "a語"


def test_stop_strings_do_not_look_into_the_prompt(recite: Recite, tiny_tokenizer: Tokenizer) -> None:
    prompt = [1, *_bytes("abc")]
    completion = generate(recite(ALPHABET), tiny_tokenizer, prompt, temperature=0, stop=["abc", "cd", "xyz"])
    assert completion.text == ALPHABET[3:-3]


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(stops=st.lists(st.text("abcdeXz", min_size=1, max_size=4), max_size=3), limit=st.integers(1, 27))
def test_pieces_add_up(stops: list[str], limit: int, recite: Recite, tiny_tokenizer: Tokenizer) -> None:
    """For any stop strings, the text ends before the first that is complete, and the joined pieces are the text."""
    pieces, completion = _pieces(recite(ALPHABET), tiny_tokenizer, stop=stops, max_new_tokens=limit)
    ends = [ALPHABET[:limit].find(stop) + len(stop) for stop in stops if stop in ALPHABET[:limit]]
    expected, reason = ALPHABET[:limit], "stop" if limit == 27 else "length"
    if ends:
        first = min(ends)
        starts = [first - len(stop) for stop in stops if ALPHABET[:first].endswith(stop)]
        expected, reason = ALPHABET[: min(starts)], "stop"
    assert "".join(pieces) == completion.text == expected
    assert completion.finish_reason == reason


# ---- Batches, spaces, iteration -------------------------------------------------------------------------------------


def test_batches_come_as_lists(recite: Recite, tiny_tokenizer: Tokenizer) -> None:
    """A row that has ended gives no more text, and the other rows go on."""
    prompts = [[1, *_bytes("v")], [1, *_bytes("a")]]
    run = stream(recite(ALPHABET), tiny_tokenizer, prompts, temperature=0, stop="m")
    pieces = list(run)
    assert all(isinstance(piece, list) and len(piece) == 2 for piece in pieces)
    assert ["".join(row) for row in zip(*pieces, strict=True)] == ["wxyz", "bcdefghijkl"]
    assert [completion.text for completion in run.completions] == ["wxyz", "bcdefghijkl"]
    assert [completion.finish_reason for completion in run.completions] == ["stop", "stop"]
    assert run.speed.decode_tokens == sum(len(completion.tokens) for completion in run.completions)


def test_one_prompt_in_a_list_is_a_batch(recite: Recite, tiny_tokenizer: Tokenizer) -> None:
    assert isinstance(generate(recite("ab"), tiny_tokenizer, "", temperature=0), llamajax.Completion)
    (only,) = generate(recite("ab"), tiny_tokenizer, [""], temperature=0)
    assert only.text == "ab"
    assert next(iter(stream(recite("ab"), tiny_tokenizer, [""], temperature=0, smooth=False))) == ["ab"]


def test_a_space_after_the_prompt_belongs_to_the_text(tiny_tokenizer: Tokenizer, recite: Recite) -> None:
    model = recite(" fox")
    assert generate(model, tiny_tokenizer, [1, 3 + ord("x"), 1], temperature=0).text == " fox"


def test_an_unfinished_stream_has_what_there_is(recite: Recite, tiny_tokenizer: Tokenizer) -> None:
    run = stream(recite(ALPHABET), tiny_tokenizer, "", temperature=0)
    first = next(iter(run))
    assert run.completions[0].text == first == "a"
