"""What each quantization recipe costs on the model in the box: the table of the README.

    python benchmarks/recipes.py

Stories that the box was not trained on; bits a weight and bytes of all weights, norms included; KL divergence and top-1
agreement against the box's own bfloat16 weights, computed in float32.
"""

import math

import jax
import jax.numpy as jnp
from absl import app

import llamajax
from llamajax.evaluate import compare, encode_documents
from llamajax.quantize import quantize, recipe_names
from llamajax.train import heldout_stories


def main(argv):
    """Prints the table."""
    del argv
    model, tokenizer = llamajax.load("box", dtype=jnp.float32)
    tokens = encode_documents(tokenizer, heldout_stories())
    print("| recipe | bits a weight | bytes | perplexity | KL divergence, nats | top-1 agreement |")
    print("|---|---|---|---|---|---|")
    rows = []
    for name in recipe_names():
        quantized = quantize(model, name)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))
        rows.append((size, name, compare(quantized, model, tokens)))
    loss = rows[0][2].reference_cross_entropy
    size = 2 * model.config.num_parameters
    print(f"| bfloat16 | 16.00 | {size:,} | {math.exp(loss):.4f} | 0 | 100% |")
    for size, name, result in sorted(rows, reverse=True):
        bits = 8 * size / model.config.num_parameters
        perplexity = math.exp(result.cross_entropy)
        print(
            f"| `{name}` | {bits:.2f} | {size:,} | {perplexity:.4f} | {result.kl_divergence:.5f} "
            f"| {result.top1_agreement:.2%} |"
        )


if __name__ == "__main__":
    app.run(main)
