"""Calibration text that the model generates itself."""

import numpy as np
import pytest

import llamajax
from llamajax.quantization.own_text import own_text
from tests.reference import random_model
from tests.test_sensitivity import CONFIG


class Words:
    """A stand-in for a tokenizer, with the only attribute that is used."""

    def __init__(self, bos_id: int | None):
        """Makes one with this BOS id, or without a BOS."""
        self.bos_id = bos_id


@pytest.mark.parametrize("bos_id", [1, None])
def test_texts_of_the_models_own_distribution(bos_id: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text has as many tokens as requested and is fixed by its seed; likelier tokens are drawn more often."""
    said: list[tuple[int, int]] = []
    model = random_model(CONFIG)
    monkeypatch.setattr("llamajax.quantization.own_text.generate", _without_tokenizer)
    made = own_text(model, Words(bos_id), 300, length=12, on_tokens=lambda *at: said.append(at))
    assert made.dtype == np.int32 and made.shape == (300,) and made.min() >= 0 and made.max() < CONFIG.vocab_size
    assert said[-1] == (300, 300) and len(said) == 2
    np.testing.assert_array_equal(made, own_text(model, Words(bos_id), 300, length=12))
    assert not np.array_equal(made, own_text(model, Words(bos_id), 300, length=12, seed=1))
    texts = made[:288].reshape(-1, 12)
    if bos_id is not None:
        assert set(texts[:, 0]) == {1}
    assert len({tuple(text) for text in texts}) > 20, "the samples differ"


def _without_tokenizer(model, tokenizer, prompt, **options):
    return llamajax.generate(model, None, prompt, **options)
