"""Every kind of sentencepiece model, and every flag of its normalizer, against sentencepiece itself."""

import io
from typing import Any

import pytest
import sentencepiece

from llamajax import Tokenizer
from tests.texts import random_texts

_CORPUS = [
    "The quick brown fox jumps over 12 lazy dogs.",
    "ﬁne ﬂow, Ünïcode  and   spaces",
    "日本語 cafe\u0301 naïve",
] * 20

MODELS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram"},
    "char": {"model_type": "char"},
    "unigram with bytes": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 350},
    "bpe with bytes": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 350},
    "nfkc": {"normalization_rule_name": "nfkc"},
    "nmt_nfkc_cf": {"normalization_rule_name": "nmt_nfkc_cf", "model_type": "bpe"},
    "identity": {"normalization_rule_name": "identity", "model_type": "bpe"},
    "no dummy prefix": {"add_dummy_prefix": False, "model_type": "bpe"},
    "no dummy prefix, unigram": {"add_dummy_prefix": False},
    "all spaces kept": {"remove_extra_whitespaces": False, "model_type": "bpe"},
    "all spaces kept, unigram": {"remove_extra_whitespaces": False},
    "spaces alone": {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "model_type": "bpe"},
    "user-defined": {"user_defined_symbols": ["<tool>", "fox"], "model_type": "bpe"},
    "control": {"control_symbols": ["<ctl>"], "bos_id": -1, "eos_id": -1, "unk_id": 0},
    "suffix": {"treat_whitespace_as_suffix": True, "model_type": "bpe"},
}


def train(**options: Any) -> bytes:
    model = io.BytesIO()
    settings = {"vocab_size": 90, "hard_vocab_limit": False, "minloglevel": 2} | options
    if settings.get("model_type") == "bpe" and "byte_fallback" not in options:
        settings["vocab_size"] = 80
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(_CORPUS), model_writer=model, **settings)
    return model.getvalue()


@pytest.mark.parametrize("name", MODELS)
def test_ids_and_text_are_sentencepieces(name: str) -> None:
    data = train(**MODELS[name])
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=data), Tokenizer(data)
    assert ours.vocab_size == theirs.vocab_size()
    for text in [*random_texts(300), "", " ", "the fox <tool>", "  two  spaces ", "a <ctl> b"]:
        ids = theirs.encode(text)
        assert ours.encode(text, bos=False) == ids, text
        if ids and theirs.id_to_piece(ids[0]) == "▁":  # sentencepiece leaves fewer spaces
            assert ours.decode(ids).lstrip(" ") == theirs.decode(ids).lstrip(" "), text
        else:
            assert ours.decode(ids) == theirs.decode(ids), text
        stream = ours.stream()
        assert "".join([stream.add(index) for index in ids]) + stream.finish() == ours.decode(ids)
