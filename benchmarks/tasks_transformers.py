"""Answers tasks with Hugging Face transformers, and compares them with `llamajax eval --task`, question by question.

    llamajax convert --model=SmolLM2.gguf --to=gguf --dtype=float32 --output=float32.gguf
    llamajax convert --model=float32.gguf --to=huggingface --output=smollm2
    llamajax eval --model=SmolLM2.gguf --task=copa.jsonl,openbook_qa.jsonl --output=said.jsonl
    python benchmarks/tasks_transformers.py --folder=smollm2 --said=said.jsonl copa.jsonl openbook_qa.jsonl

Written from lm-evaluation-harness (`_encode_pair`, `_loglikelihood_tokens` and `generate_until` of its models; "acc",
"acc_norm" and the standard error of its tasks), and without any code of llamajax: transformers' tokenizer encodes the
texts, and the model computes in float32. Prints the accuracies of both sides, the number of questions with the same
choice, the largest difference of a log likelihood, and the log likelihoods of each question that differs.
"""

import argparse
import collections
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
import transformers

STOP, MAX_NEW_TOKENS, BATCH = "\n", 64, 16


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Returns the ids of both. White space at the context's end moves to the continuation; ids are split by number."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, before = tokenizer.encode(context + continuation), tokenizer.encode(context)
    return before, whole[len(before) :]


@torch.no_grad()
def log_likelihoods(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Returns each continuation's log likelihood given its context, and whether greedy decoding gives it."""
    encoded = [encode_pair(tokenizer, *pair) for pair in pairs]
    longest = model.config.max_position_embeddings + 1
    rows = [torch.tensor((before + behind)[-longest:][:-1]) for before, behind in encoded]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    result: dict[int, tuple[float, bool]] = {}
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        # Padding is at the end, where no earlier token sees it.
        logits = model(torch.nn.utils.rnn.pad_sequence([rows[i] for i in chosen], batch_first=True)).logits
        for i, of_row in zip(chosen, logits, strict=True):
            targets = torch.tensor(encoded[i][1])
            said = of_row[len(rows[i]) - len(targets) : len(rows[i])]
            each = torch.log_softmax(said, dim=-1)[torch.arange(len(targets)), targets]
            result[i] = (each.double().sum().item(), bool((said.argmax(dim=-1) == targets).all()))
    return [result[i] for i in range(len(rows))]


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """Returns the greedy continuation up to a new line."""
    ids = torch.tensor([tokenizer.encode(prompt)])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        stop_strings=[STOP],
        tokenizer=tokenizer,
    )
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).split(STOP)[0]


def last_number(text: str) -> str | None:
    """Returns the last number by gsm8k's "flexible-extract", without the characters that gsm8k ignores."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    if not found:
        return None
    return re.sub(r",|\$|\.$", "", next(group for group in found[-1] if group))


def asked(model: Any, tokenizer: Any, questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the model's answers to questions of any kind, in the form of `llamajax eval --output`."""
    first = questions[0]
    if "choices" in first:
        pairs = [(question["query"], " " + each) for question in questions for each in question["choices"]]
        said = iter(log_likelihoods(model, tokenizer, pairs))
        return [chosen(question, [next(said)[0] for _ in question["choices"]]) for question in questions]
    if "continuation" in first:
        pairs = [(question["context"], " " + question["continuation"]) for question in questions]
        found = log_likelihoods(model, tokenizer, pairs)
        return [{"log_likelihood": value, "acc": greedy} for value, greedy in found]
    outcomes = []
    for question in questions:
        text = answer(model, tokenizer, f"Question: {question.get('question', question.get('context'))}\nAnswer:")
        number = last_number(text)
        outcomes.append({"text": text, "number_match": number is not None and number == question["answer"]})
    return outcomes


def chosen(question: dict[str, Any], said: list[float]) -> dict[str, Any]:
    """Returns the likeliest choice, and the likeliest choice per character."""
    normed = [value / len(each) for value, each in zip(said, question["choices"], strict=True)]
    choices = {"acc": said.index(max(said)), "acc_norm": normed.index(max(normed))}
    right = {name: choice == question["gold"] for name, choice in choices.items()}
    return {"log_likelihoods": said, "chosen": choices, **right}


def mean_and_error(values: list[Any]) -> str:
    """Formats a mean and its standard error (sample standard deviation over the root of the size) in per cent."""
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{100 * mean:.2f} ± {100 * deviation / math.sqrt(len(values)):.2f}"


def compare(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> None:
    """Prints the results of both sides and their differences."""
    for name in ("acc", "acc_norm", "number_match"):
        if name in theirs[0] and name in ours[0]:
            pair = [mean_and_error([each[name] for each in side]) for side in (theirs, ours)]
            print(f"  {name}: transformers {pair[0]}, llamajax {pair[1]}")
    if "chosen" in theirs[0]:
        gap = max(
            abs(a - b)
            for t, o in zip(theirs, ours, strict=True)
            for a, b in zip(t["log_likelihoods"], o["log_likelihoods"], strict=True)
        )
        for name in ("acc", "acc_norm"):
            other = [i for i, t in enumerate(theirs) if t["chosen"][name] != ours[i]["chosen"][name]]
            print(f"  same choice by {name}: {len(theirs) - len(other)} of {len(theirs)}")
            for i in other:
                print(f"    question {i + 1}: {theirs[i]['log_likelihoods']} and {ours[i]['log_likelihoods']}")
        print(f"  largest difference of a log likelihood: {gap:.2e}")
    elif "log_likelihood" in theirs[0]:
        gap = max(abs(t["log_likelihood"] - o["log_likelihood"]) for t, o in zip(theirs, ours, strict=True))
        same = sum(t["acc"] == o["acc"] for t, o in zip(theirs, ours, strict=True))
        perplexities = [math.exp(-sum(e["log_likelihood"] for e in side) / len(side)) for side in (theirs, ours)]
        print(f"  perplexity: transformers {perplexities[0]:.4f}, llamajax {perplexities[1]:.4f}")
        print(f"  same greedy outcome: {same} of {len(theirs)}; largest difference of a log likelihood: {gap:.2e}")
    else:
        other = [i for i, t in enumerate(theirs) if t["text"] != ours[i]["text"]]
        print(f"  same text: {len(theirs) - len(other)} of {len(theirs)}")
        for i in other[:5]:
            print(f"    question {i + 1}: {theirs[i]['text']!r} and {ours[i]['text']!r}")


def main() -> None:
    """Asks the questions of the files and compares with the answers of llamajax."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", required=True, help="Hugging Face folder of the same weights in float32")
    parser.add_argument("--said", required=True, help="file that llamajax eval --task=… --output= wrote, for one model")
    parser.add_argument("tasks", nargs="+", help="files of questions")
    options = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.folder)
    said = collections.defaultdict(list)
    for line in Path(options.said).read_text(encoding="utf-8").splitlines():
        outcome = json.loads(line)
        said[Path(outcome["task"]).name].append(outcome)
    for task in map(Path, options.tasks):
        ours = said[task.name]
        questions = [json.loads(line) for line in task.read_text(encoding="utf-8").splitlines()][: len(ours)]
        print(f"{task.name}: {len(questions)} questions", flush=True)
        compare(asked(model, tokenizer, questions), ours)


if __name__ == "__main__":
    main()
