"""`llamajax eval`: how well a model predicts a text."""

import json
import math

from absl import flags

from llamajax.cli.common import define_dtype, define_model, load_model, progress
from llamajax.errors import LlamaJaxError
from llamajax.evaluate import cross_entropy, encode_documents, read_documents
from llamajax.train import heldout_stories

SUMMARY = "measure cross-entropy and perplexity on a text"
EXAMPLES = (
    "llamajax eval --model=box --text=stories",
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
    with progress("evaluating") as on_batch:
        loss = cross_entropy(model, tokens, window=values.context, batch=values.batch, on_batch=on_batch)
    result = {
        "model": values.model,
        "text": values.text,
        "context": values.context,
        "tokens": (len(tokens) - 1) // values.context * values.context,
        "cross_entropy_nats": loss,
        "perplexity": math.exp(loss),
    }
    if values.json:
        print(json.dumps(result))
    else:
        print(f"cross-entropy {loss:.4f} nats/token, perplexity {math.exp(loss):.4f}, {result['tokens']} tokens")
