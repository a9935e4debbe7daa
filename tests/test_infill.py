"""Infilling: ids as in Meta's Code Llama, other vocabularies, and the command."""

import dataclasses
import json

import pytest
import sentencepiece

from llamajax import Llama, LlamaJaxError, Tokenizer, Words, generate, save_checkpoint
from llamajax.cli import main
from llamajax.tokenizer import infill
from llamajax.tokenizer.added import AddedToken
from tests.reference import random_model

MARKS = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
PAIRS = [
    ("def add(a, b):\n    c = ", "\n    return c\n"),
    ("  x", " y "),
    ("def f():\n", "word"),
    ("é ☺", "☺\tend"),
    ("<s> ▁<SUF>", "</s>"),
    ("no suffix", "\n"),
]


def of_code(model_bytes: bytes) -> Tokenizer:
    """Returns a sentencepiece model with the added tokens that Code Llama has after its 32,000 pieces."""
    size = sentencepiece.SentencePieceProcessor(model_proto=model_bytes).vocab_size()
    added = tuple(AddedToken(id=size + i, text=text, special=True) for i, text in enumerate(MARKS))
    return Tokenizer(model_bytes, words=Words(added=added))


def metas(model_bytes: bytes, prefix: str, suffix: str) -> list[int]:
    """codellama's `infilling_prompt_tokens` and `encode_infilling`, where a smiley prevents a leading space."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    size, smiley = processor.vocab_size(), len(processor.encode("☺"))
    behind = processor.encode("☺" + suffix)[smiley:]
    return [processor.bos_id(), size, *processor.encode(prefix), size + 1, *behind, size + 2]


@pytest.mark.parametrize(("prefix", "suffix"), PAIRS)
def test_ids_are_metas(tiny_tokenizer: Tokenizer, prefix: str, suffix: str) -> None:
    tokenizer = of_code(tiny_tokenizer.model_bytes)
    ids, answering = infill(tokenizer, prefix, suffix)
    assert ids == metas(tiny_tokenizer.model_bytes, prefix, suffix)
    assert answering.stop_ids == (*tokenizer.stop_ids, tokenizer.id_of("▁<EOT>"))
    assert answering.decode([*tokenizer.encode(" middle", bos=False), answering.stop_ids[-1]]).endswith("middle")


def test_other_vocabularies() -> None:
    """Qwen2.5 Coder's marks in a byte-level tokenizer: texts stay unchanged, and there is no BOS."""
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizers.Tokenizer(tokenizers.models.BPE({chr(0x120): 0, "a": 1, "b": 2}, []))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    marks = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>"]
    plain.add_special_tokens(marks)
    made = infill(Tokenizer(plain.to_str().encode()), "a b", " a")
    ids = {token["content"]: token["id"] for token in json.loads(plain.to_str())["added_tokens"]}
    assert made[0] == [ids[marks[0]], 1, 0, 2, ids[marks[1]], 0, 1, ids[marks[2]]]
    assert ids[marks[3]] in made[1].stop_ids


def test_the_command_refuses_what_cannot_fill_in(capsys: pytest.CaptureFixture[str]) -> None:
    """The box's vocabulary has no such tokens, and a suffix cannot be part of a question."""
    for argv, message in (
        (["--suffix=x"], "no tokens for filling in"),
        (["--suffix=x", "--think"], "--suffix cannot be combined with --parse_special or --think"),
    ):
        assert main(["generate", "--prompt=Once", *argv]) != 0
        assert message in capsys.readouterr().err


def test_the_command_writes_between(tiny_model: Llama, tiny_tokenizer: Tokenizer, tmp_path, capsys) -> None:
    """Prints prompt, middle, suffix; the middle is what the library generates from the same ids."""
    tokenizer = of_code(tiny_tokenizer.model_bytes)
    config = dataclasses.replace(tiny_model.config, vocab_size=tokenizer.vocab_size, num_layers=1)
    model = random_model(config)
    save_checkpoint(model, tmp_path / "model", tokenizer=tokenizer)
    ids, answering = infill(tokenizer, "One day", " the end.")
    expected = generate(model, answering, ids, temperature=0, max_new_tokens=8).text
    argv = [f"--model={tmp_path}/model", "--prompt=One day", "--suffix= the end.", "--temperature=0"]
    assert main(["generate", *argv, "--max_new_tokens=8"]) == 0
    assert capsys.readouterr().out == f"One day{expected} the end."


def test_a_vocabulary_without_marks_is_refused(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(LlamaJaxError, match="no tokens for filling in: expected .*▁<PRE> ▁<SUF> ▁<MID>"):
        infill(tiny_tokenizer, "a", "b")
