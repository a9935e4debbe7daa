"""Random models are what a recipe promises, and benchmarks measure what was asked for. No times are compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
from llamajax.evaluation.speed import (
    FLOATS,
    Measurement,
    measure_decode,
    measure_prefill,
    memory_bandwidth,
    product_rate,
    random_model,
    resident_bytes,
)
from llamajax.generation.engine import compiled_step
from llamajax.parameters import named_weights
from llamajax.quantization.quantize import quantize
from quant import Mixed, QTensor, dequantize, nbytes
from quant.kernels.cpu import TiledWeight

CONFIG = llamajax.Config(
    vocab_size=64, width=64, ffn_width=128, num_layers=2, num_heads=4, num_kv_heads=2, head_size=16, context_length=512
)
# Counted by hand for CONFIG: query and out 64 x 64, key and value 64 x 32, three of 64 x 128; tables of 64 x 64; five
# norms.
LAYER, TABLE, NORMS = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128, 64 * 64, 5 * 64


def size(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.matrix
@pytest.mark.parametrize("recipe", ["int4-g128", "int3-g64", "nf4-g64", "ternary"])
def test_random_weights_are_as_quantized_ones(recipe: str) -> None:
    """Random weights have a quantizer's types, shapes and dtypes, and no code that a quantizer would not write."""
    made = random_model(CONFIG, recipe)
    quantized = quantize(llamajax.Llama(CONFIG, key=jax.random.key(0)), recipe)
    assert jax.tree.structure(made) == jax.tree.structure(quantized)
    for (name, ours), theirs in zip(named_weights(made).items(), named_weights(quantized).values(), strict=True):
        planes = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(weight)] for weight in (ours, theirs)]
        assert planes[0] == planes[1], name
        if isinstance(ours, QTensor):
            values = np.asarray(dequantize(ours.validate()))
            levels = 3 if ours.scheme.kind == "ternary" else 2**ours.scheme.bits
            assert 2 < len(np.unique(values)) <= levels and 0.01 < values.std() < 0.04, name
    assert np.isfinite(made(jnp.zeros((1, 8), jnp.int32))[0]).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_random_floats(dtype: str) -> None:
    model = random_model(CONFIG, dtype)
    width = np.dtype(dtype).itemsize
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {dtype}
    assert size(model) == width * (2 * LAYER + 2 * TABLE + NORMS)
    assert np.asarray(named_weights(model)["layers.*.ffn.up_DF"], np.float32).std() == pytest.approx(0.02, rel=0.1)
    np.testing.assert_array_equal(model.norm.weight_D[...], 1)
    again, other = random_model(CONFIG, dtype), random_model(CONFIG, dtype, seed=1)
    np.testing.assert_array_equal(model.embed_VD[...], again.embed_VD[...])
    assert (np.asarray(model.embed_VD[...]) != np.asarray(other.embed_VD[...])).any()


def test_layers_of_different_rules(tmp_path) -> None:
    recipe = tmp_path / "mixed.toml"
    recipe.write_text(
        "[[rules]]\nweights = '*norm*'\nkeep = true\n"
        "[[rules]]\nweights = 'layers.*'\nlayers = [0]\nscheme = 'uint4'\n"
        "[[rules]]\nweights = '*'\nscheme = 'mxfp4'\nactivations = 'int8-token'\n"
    )
    model = random_model(CONFIG, recipe)
    weight = named_weights(model)["layers.*.ffn.down_FD"]
    assert isinstance(weight, Mixed)
    assert [part.scheme.name for part in weight.stacks] == ["uint4", "mxfp4"]
    assert [part.activations for part in weight.stacks] == [None, "int8-token"]
    values = [np.asarray(dequantize(part)) for part in weight.stacks]
    assert all(0.005 < each.std() < 0.04 and abs(each.mean()) < 0.01 for each in values)
    assert np.isfinite(model(jnp.zeros((1, 8), jnp.int32))[0]).all()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("int5-g32", "recipe is 'int5-g32': expected a .toml file or one of"),
        ("mixed-4.5bpw", "depend on a text or on the weights: expected a recipe that fixes"),
    ],
)
def test_recipes_without_random_weights(weights: str, message: str) -> None:
    with pytest.raises(llamajax.LlamaJaxError, match=message):
        random_model(CONFIG, weights)


def test_a_recipe_that_quantizes_norms_is_named(tmp_path) -> None:
    recipe = tmp_path / "all.toml"
    recipe.write_text("[[rules]]\nweights = '*'\nscheme = 'int4'\n")
    with pytest.raises(llamajax.LlamaJaxError, match=r"layers.0.attention_norm.weight_D: .* rule that keeps norms"):
        random_model(CONFIG, recipe)


def test_a_decode_step_reads_and_computes_what_it_must() -> None:
    model = random_model(CONFIG, "bfloat16")
    measured = measure_decode(model, 40, batch=3, cache_dtype="float32", steps=2, repeats=1)
    assert (measured.phase, measured.batch, measured.length, measured.tokens) == ("decode", 3, 40, 3)
    cache = 40 * 3 * CONFIG.num_layers * 2 * CONFIG.num_kv_heads * CONFIG.head_size * 4
    assert measured.bytes_read == 2 * (2 * LAYER + TABLE + NORMS) + cache, "only three rows of the embeddings"
    attention = 41 * 2 * 2 * 2 * 64  # 41 keys and as many values, in 2 layers of 64 elements, products and sums
    assert measured.operations == 3 * (2 * (2 * LAYER + TABLE) + attention)
    assert measured.tokens_per_second == 3 / measured.seconds
    assert measured.gigabytes_per_second == pytest.approx(measured.bytes_read / measured.seconds / 1e9)


def test_a_tied_head_is_read() -> None:
    config = llamajax.Config.from_dict(CONFIG.to_dict() | {"tied_embeddings": True})
    measured = measure_decode(random_model(config, "float32"), 1, cache_dtype="int8", steps=1, repeats=1)
    # Each head takes 16 bytes, a float32 scale and a zero point, for keys and for values.
    cache = CONFIG.num_layers * 2 * CONFIG.num_kv_heads * (16 + 4 + 1)
    assert measured.bytes_read == 4 * (2 * LAYER + TABLE + NORMS) + cache


def test_prefill_counts_tokens_not_padding() -> None:
    measured = measure_prefill(random_model(CONFIG, "float32"), 300, repeats=1)
    assert (measured.phase, measured.batch, measured.length, measured.tokens) == ("prefill", 1, 300, 300)
    assert measured.bytes_read == 2 * 4 * (2 * LAYER + NORMS), "two chunks read the layers; the head is not read"
    pairs = 300 * 301 // 2
    assert measured.operations == 300 * 2 * 2 * LAYER + pairs * 2 * 2 * 2 * 64
    assert measured.programs == 2, "one program for 256 tokens, one for the smallest bucket that holds 44"


def test_prefill_of_several_rows() -> None:
    one, three = (measure_prefill(random_model(CONFIG, "float32"), 20, batch=batch, repeats=1) for batch in (1, 3))
    assert (three.batch, three.length, three.tokens) == (3, 20, 60)
    assert (three.bytes_read, three.operations) == (one.bytes_read, 3 * one.operations)


def test_bytes_of_weights_are_those_of_the_layout() -> None:
    """A TPU keeps two 4-bit codes in a byte, though `nbytes` of the array of codes does not show it."""
    model = random_model(CONFIG, "int4-g32")
    stored = nbytes(model)
    wider = 2 * (2 * LAYER + TABLE) // 32  # its scales are float32 instead of float16
    sizes = [nbytes(llamajax.prepare(model, backend)) for backend in ("cpu", "gpu", "tpu")]
    assert sizes == [stored, stored, stored + wider]


def test_programs_are_counted_once_and_are_those_of_generate() -> None:
    model = random_model(CONFIG, "float32")
    first = measure_decode(model, 5, steps=1, repeats=2)
    assert first.programs == 1 and first.compile_seconds > 0
    again = measure_decode(model, 100, steps=2, repeats=1)
    assert again.programs == 0 and again.compile_seconds == 0
    compiled = compiled_step.total.compilations
    llamajax.generate(model, None, [1], max_new_tokens=2, temperature=0)
    assert compiled_step.total.compilations == compiled


def test_prepared_models_are_measured() -> None:
    model = llamajax.prepare(random_model(CONFIG, "int4-g32"), donate=True)
    assert isinstance(named_weights(model)["layers.*.ffn.up_DF"], TiledWeight) == (jax.default_backend() == "cpu")
    measured = measure_decode(model, 9, steps=1, repeats=1)
    slot = CONFIG.num_layers * 2 * CONFIG.num_kv_heads * CONFIG.head_size * 4
    assert measured.bytes_read == (2 * LAYER + TABLE) * 4.5 / 8 + 4 * NORMS + 9 * slot


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context is 0: expected at least 1"),
        ({"context": 513}, "513 tokens: expected at most 512"),
        ({"context": 1, "batch": 0}, "batch is 0"),
        ({"context": 1, "steps": 65}, "steps is 65: expected at most 64"),
        ({"context": 1, "repeats": 0}, "repeats is 0"),
        ({"context": 1, "cache_dtype": "int2"}, "the cache's dtype is 'int2'"),
    ],
)
def test_values_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(llamajax.LlamaJaxError, match=message):
        measure_decode(random_model(CONFIG, "float32"), **options)


def test_what_the_machine_can_do_is_positive() -> None:
    assert memory_bandwidth(1 << 20, repeats=1) > 0
    assert product_rate(CONFIG, repeats=1) > 0
    resident = resident_bytes()
    assert resident is None or 1 << 24 < resident < 1 << 40, "a Python process with jax takes more than 16 MiB"


def test_the_limit_is_that_of_the_slower() -> None:
    measured = Measurement("decode", 2, 9, 2, 1.0, 100, 1000, 0, 0.0, None)
    assert measured.limit(bandwidth=10, flops=1e9) == 2 / 10
    assert measured.limit(bandwidth=1e9, flops=50) == 2 / 20
