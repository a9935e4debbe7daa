"""Tasks against Hugging Face transformers: a tiny random model and its tokenizer, both read from their folder."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import llamajax
from llamajax import TaskResult, evaluate_task

_REASON = "compares with Hugging Face transformers: install the extra: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=_REASON)
transformers = pytest.importorskip("transformers", reason=_REASON)
pytestmark = pytest.mark.extras

from benchmarks.tasks_transformers import asked  # noqa: E402

TEXTS = ["Once upon a time there was a fox.", "He lived by a river, in 12 houses.", "Question: How many?\nAnswer: 7"]
CHOICES = [
    {"query": f"{subject} {verb}", "choices": ["time there was a fox.", "xyz", "house"], "gold": i % 3}
    for i, (subject, verb) in enumerate((s, v) for s in ("The fox", "Ted", "Mia") for v in ("saw", "lived by", "found"))
]
CLOZES = [{"context": text[:20].rstrip(), "continuation": text[20:].strip()} for text in TEXTS]
ANSWERS = [{"context": f"How many {things} are there?", "answer": "7"} for things in ("apples", "houses", "foxes")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder that transformers writes: byte-level BPE, as GPT-2's, and random weights large enough to matter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    library.train_from_iterator(TEXTS * 9, trainer)
    path = tmp_path_factory.mktemp("transformers") / "model"
    end = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=library, **end).save_pretrained(path)
    config = transformers.LlamaConfig(
        vocab_size=library.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """Returns a function that asks transformers questions."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return lambda questions: asked(model, tokenizer, questions)


def ours(folder: Path, questions: list[dict[str, Any]], tmp_path: Path) -> TaskResult:
    """Returns our results for questions, which are read from a file."""
    path = tmp_path / "task.jsonl"
    path.write_text("".join(f"{json.dumps(question)}\n" for question in questions))
    model, tokenizer = llamajax.load(folder)
    assert tokenizer is not None
    return evaluate_task(model, tokenizer, path, batch=4)


def test_the_same_choices(folder: Path, theirs: Any, tmp_path: Path) -> None:
    result = ours(folder, CHOICES, tmp_path)
    expected = theirs(CHOICES)
    for our, their in zip(result.outcomes, expected, strict=True):
        assert our["log_likelihoods"] == pytest.approx(their["log_likelihoods"], abs=2e-4)
        assert {name: our["chosen"][name] for name in their["chosen"]} == their["chosen"]
    for name in ("acc", "acc_norm"):
        right = [each[name] for each in expected]
        mean = sum(right) / 9
        error = math.sqrt(sum((x - mean) ** 2 for x in right) / 8 / 9)
        assert result.measures[name] == (pytest.approx(mean), pytest.approx(error)) and 0 < mean < 1
    assert any(each["chosen"]["acc"] != each["chosen"]["acc_norm"] for each in expected)


def test_the_same_clozes_and_answers(folder: Path, theirs: Any, tmp_path: Path) -> None:
    for our, their in zip(ours(folder, CLOZES, tmp_path).outcomes, theirs(CLOZES), strict=True):
        assert our["log_likelihood"] == pytest.approx(their["log_likelihood"], abs=2e-4) and our["acc"] == their["acc"]
    for our, their in zip(ours(folder, ANSWERS, tmp_path).outcomes, theirs(ANSWERS), strict=True):
        assert our["text"] == their["text"] and our["number_match"] == their["number_match"]
