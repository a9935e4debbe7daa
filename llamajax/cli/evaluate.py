"""`llamajax eval`: how well a model predicts a text."""

import json
import math
from typing import Any

from absl import flags

from llamajax.checkpoint import open_checkpoint
from llamajax.cli.common import define_dtype, define_model, load_model, progress, read_model
from llamajax.errors import LlamaJaxError
from llamajax.evaluate import compare, cross_entropy, encode_documents, read_documents
from llamajax.train import heldout_stories

SUMMARY = "measure cross-entropy and perplexity on a text, and the distance to another model"
EXAMPLES = (
    "llamajax eval --model=box --text=stories",
    "llamajax eval --model=box-int4 --reference=box",
    "llamajax eval --model=stories260K.bin --tokenizer=tok512.model --text=tinystories.txt --context=256 --json",
)


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    define_model(values)
    define_dtype(values)
    flags.DEFINE_string(
        "text",
        "stories",
        "UTF-8 file, documents separated by <|endoftext|>; or stories, 200 stories that the box was not trained on",
        flag_values=values,
    )
    flags.DEFINE_string(
        "reference", None, "checkpoint to compare with: KL divergence and top-1 agreement", flag_values=values
    )
    flags.DEFINE_integer("context", 512, "window in tokens; windows do not overlap", flag_values=values)
    flags.DEFINE_integer("batch", 8, "windows evaluated at once", flag_values=values)
    flags.DEFINE_boolean("json", False, "print one JSON object", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Prints a line, or JSON."""
    if values.context < 1 or values.batch < 1:
        raise LlamaJaxError(f"context is {values.context} and batch {values.batch}: expected at least 1")
    documents = heldout_stories() if values.text == "stories" else read_documents(values.text)
    model, tokenizer = load_model(values)
    tokens = encode_documents(tokenizer, documents)
    options: dict[str, Any] = {"window": values.context, "batch": values.batch}
    comparison: dict[str, float] = {}
    with progress("evaluating") as on_batch:
        if values.reference:
            reference = read_model(open_checkpoint(values.reference), model.dtype)
            comparison = compare(model, reference, tokens, **options, on_batch=on_batch)._asdict()
            loss = comparison.pop("cross_entropy")
        else:
            loss = cross_entropy(model, tokens, **options, on_batch=on_batch)
    result = {
        "model": values.model,
        "text": values.text,
        "context": values.context,
        "tokens": (len(tokens) - 1) // values.context * values.context,
        "cross_entropy_nats": loss,
        "perplexity": math.exp(loss),
        **comparison,
    }
    if values.json:
        print(json.dumps(result))
    else:
        print(f"cross-entropy {loss:.4f} nats/token, perplexity {math.exp(loss):.4f}, {result['tokens']} tokens")
        for name, value in comparison.items():
            print(f"{name.replace('_', ' ')} {value:.5f}")
