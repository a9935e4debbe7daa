"""A model's internals: captured values, their replacement, and single layers, against the NumPy reference."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llamajax import Config, KVCache, Llama, LlamaJaxError, NoCache, abstract_model, next_token_losses, prepare
from llamajax.layer import Layer
from llamajax.model import model_from
from llamajax.parameters import leaves, named_weights, unrolled
from llamajax.quantization.quantize import Rule, quantize
from quant import Mixed, is_laid_out, values
from tests import reference
from tests.programs import QUICK
from tests.reference import random_model, weights_of

CONFIG = Config(
    vocab_size=50,
    width=32,
    ffn_width=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    context_length=512,
)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 9)).astype(np.int32)
INT4 = (Rule(weights="*norm*", keep=True), Rule(weights="*", scheme="int4", group_size=8))
PARTS = {"ffn_out": "mlp.down_proj", "attention_out": "self_attn.o_proj"}


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def weights(model: Llama) -> reference.Weights:
    return weights_of(model)


@pytest.fixture(scope="module")
def int4(model: Llama) -> Llama:
    return quantize(model, INT4)


def floats(model: Llama) -> reference.Weights:
    """Returns the values of a model's weights in any form, for the reference."""
    named = {name: values(weight) for name, weight in named_weights(model).items()}
    return weights_of(model_from(named, model.config, model.plan))


def logits_of(weights: reference.Weights) -> np.ndarray:
    return np.stack([reference.forward(CONFIG, weights, row) for row in TOKENS])


def changed(weights: reference.Weights, layer: int, name: str, change: Any) -> reference.Weights:
    """Returns the weights with one matrix of one layer changed."""
    full = f"model.layers.{layer}.{name}.weight"
    return weights | {full: change(weights[full])}


SEEN = ("hidden", "attention", "attention_out", "ffn_out")

# ---- Capturing ------------------------------------------------------------------------------------------------------


def assert_captured(captured: dict[str, Any], weights: reference.Weights, first: int = 0, names: tuple = SEEN) -> None:
    """Checks captured values of tokens from `first` on; cache slots after them must have weight 0."""
    assert sorted(captured) == sorted(names)
    T = TOKENS.shape[1]
    for b, row in enumerate(TOKENS):
        expected = reference.trace(CONFIG, weights, row)
        for name in names:
            actual, wanted = np.asarray(captured[name])[:, b], getattr(expected, name)
            if name == "attention":
                assert not actual[..., T:].any()
                actual = actual[..., :T]
            np.testing.assert_allclose(actual, wanted[..., first:, :], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("layout", [None, "dense", "straight", "tiled"])
def test_captured_is_numpys(model: Llama, weights: reference.Weights, layout: str | None) -> None:
    """Captures everything at once, without a cache or in the second of two pieces of a text."""
    run = jax.jit(lambda *args: model(*args, capture=SEEN), compiler_options=QUICK)
    if layout is None:
        logits_BTV, cache, captured = run(TOKENS)
        assert cache == NoCache()
        assert_captured(captured, weights)
    else:
        cache = KVCache.empty(CONFIG, 2, 64, layout=layout)
        _, cache, _ = run(TOKENS[:, :5], cache)
        logits_BTV, cache, captured = run(TOKENS[:, 5:], cache)
        assert_captured(captured, weights, first=5)
        assert cache.length_B.tolist() == [9, 9]
    np.testing.assert_allclose(logits_BTV, logits_of(weights)[:, -logits_BTV.shape[1] :], atol=1e-4)


def test_captured_of_layers_that_are_stacks_of_their_own(model: Llama, weights: reference.Weights) -> None:
    """Values are in the order of layers, from a program without loops."""
    named, plan = named_weights(model), unrolled(CONFIG.stacks)
    alone = {
        name: named[name] if leaf.layers is None else named[f"layers.*.{leaf.name}"][leaf.layers.start][None]
        for name, leaf in leaves(CONFIG, plan).items()
    }
    without_loops = model_from(alone, CONFIG, plan)
    lowered = jax.jit(lambda model: model(TOKENS, capture=SEEN)).lower(without_loops)
    assert "stablehlo.while" not in lowered.as_text()
    assert_captured(lowered.compile(compiler_options=QUICK)(without_loops)[2], weights)


def test_captured_of_prepared_weights(int4: Llama) -> None:
    prepared = prepare(int4, "cpu")
    names = ("attention_out", "hidden")
    _, _, captured = jax.jit(lambda model: model(TOKENS, capture=names), compiler_options=QUICK)(prepared)
    assert is_laid_out(prepared)
    assert_captured(captured, floats(int4), names=names)


def test_parts_make_the_whole(model: Llama, weights: reference.Weights) -> None:
    x_BTD, cache = model.blocks(model.embed(TOKENS))
    hidden = np.stack([reference.trace(CONFIG, weights, row).hidden[-1] for row in TOKENS])
    np.testing.assert_allclose(x_BTD, hidden, atol=2e-5)
    np.testing.assert_allclose(model.head(x_BTD), logits_of(weights), atol=1e-4)
    assert cache == NoCache()


def test_captured_on_a_mesh_of_explicit_axes(model: Llama, weights: reference.Weights) -> None:
    """One device, which every machine has, is enough: the types are the same as with several."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    spread = lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "x")))  # noqa: E731
    rows = jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec("x", None)))
    model = jax.tree.map(spread, model)
    for hooks in ({}, {("ffn_out", 1): spread(jnp.zeros(CONFIG.width))}):
        _, _, captured = jax.jit(lambda *args: args[0](args[1], capture=SEEN, hooks=args[2]))(model, rows, hooks)
        expected = changed(weights, 1, PARTS["ffn_out"], np.zeros_like) if hooks else weights
        assert_captured(captured, expected)
        assert all(array.sharding.mesh == mesh for array in captured.values())


# ---- Replacing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("layer", range(3))
def test_a_half_of_a_layer_replaced(model: Llama, weights: reference.Weights, name: str, layer: int) -> None:
    """Zeros act as a last matrix of zeros would; a function that doubles the half acts as a doubled matrix would."""
    run = jax.jit(lambda hooks: model(TOKENS, hooks=hooks)[0], compiler_options=QUICK)
    none = run({(name, layer): jnp.zeros(CONFIG.width)})
    np.testing.assert_allclose(none, logits_of(changed(weights, layer, PARTS[name], np.zeros_like)), atol=1e-4)
    double = jax.jit(lambda: model(TOKENS, hooks={(name, layer): lambda x: 2 * x})[0], compiler_options=QUICK)()
    np.testing.assert_allclose(double, logits_of(changed(weights, layer, PARTS[name], lambda w: 2 * w)), atol=1e-4)
    assert np.max(np.abs(double - none)) > 0.1


@pytest.mark.parametrize("layout", [None, "dense", "tiled"])
def test_attention_replaced(model: Llama, weights: reference.Weights, layout: str | None) -> None:
    """Even weights over all visible positions equal queries of zero; the captured weights are the replaced ones."""
    slots = TOKENS.shape[1] if layout is None else 64
    even_TS = np.tril(np.ones((9, slots), np.float32)) / np.arange(1, 10, dtype=np.float32)[:, None]
    cache = NoCache() if layout is None else KVCache.empty(CONFIG, 2, slots, layout=layout)

    def run(cache, even_TS):
        return model(TOKENS, cache, capture=("attention",), hooks={("attention", 1): even_TS})

    logits_BTV, _, captured = jax.jit(run, compiler_options=QUICK)(cache, even_TS)
    expected = changed(weights, 1, "self_attn.q_proj", np.zeros_like)
    np.testing.assert_allclose(logits_BTV, logits_of(expected), atol=1e-4)
    assert_captured(captured, expected, names=("attention",))


def test_several_hooks_and_hidden_states(model: Llama, weights: reference.Weights) -> None:
    """The other row's hidden state makes all later layers the other row's; the replaced value is captured."""
    _, _, seen = model(TOKENS[::-1], capture=("hidden",))
    hooks = {("hidden", 1): seen["hidden"][1], ("attention_out", 0): jnp.ones(())}
    logits_BTV, _, captured = model(TOKENS, hooks=hooks, capture=("hidden", "attention_out"))
    np.testing.assert_allclose(logits_BTV, logits_of(weights)[::-1], atol=1e-4)
    np.testing.assert_array_equal(captured["hidden"][1], seen["hidden"][1])
    np.testing.assert_array_equal(captured["attention_out"][0], 1)
    assert np.max(np.abs(captured["hidden"][0] - seen["hidden"][0])) > 0.1


def test_hooks_are_arguments(model: Llama, weights: reference.Weights) -> None:
    """Another value needs no new program, another layer does; both give right results."""
    traced = []

    @jax.jit
    def run(hooks):
        traced.append(sorted(hooks))
        return model(TOKENS, hooks=hooks)[0]

    for layer, scale in ((0, 0.0), (0, 1.0), (2, 1.0)):
        # No matrix gives a constant output, so NumPy's pass is written out.
        value_D = np.linspace(-1, 1, CONFIG.width).astype(np.float32) * np.float32(scale)
        logits_BTV = run({("ffn_out", layer): value_D})
        expected = []
        for row in TOKENS:
            x = weights["model.embed_tokens.weight"][row]
            for number in range(3):
                prefix = f"model.layers.{number}"
                normed = reference.rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], CONFIG.norm_eps)
                x = x + reference.attention(CONFIG, weights, f"{prefix}.self_attn", normed, False)[0]
                normed = reference.rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], CONFIG.norm_eps)
                x = x + (value_D if number == layer else reference.feed_forward(weights, f"{prefix}.mlp", normed))
            expected.append(reference.head(CONFIG, weights, x))
        np.testing.assert_allclose(logits_BTV, expected, atol=1e-4)
    assert traced == [[("ffn_out", 0)], [("ffn_out", 2)]]


@pytest.mark.parametrize(("name", "layer"), [("hiden", 0), ("hidden", 3), ("hidden", -1), ("logits", 1)])
def test_what_there_is_not_cannot_be_replaced(model: Llama, name: str, layer: int) -> None:
    message = (
        f"'{name}' of layer {layer}: expected one of attention, attention_out, ffn_out, hidden, and a layer from 0 to 2"
    )
    with pytest.raises(LlamaJaxError, match=re.escape(message)):
        model(TOKENS, hooks={(name, layer): jnp.zeros(())})
    if layer == 0:
        with pytest.raises(LlamaJaxError, match=re.escape(message)):
            model(TOKENS, capture=("hidden", name))


# ---- Single layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["floats", "int4", "prepared", "mixed"])
def test_a_layer_by_itself(model: Llama, int4: Llama, kind: str) -> None:
    """Applied to the hidden state before it, a layer gives the hidden state after it."""
    mixed = int4.with_layer(0, model.layer(0))
    whole = {"floats": model, "int4": int4, "prepared": prepare(int4, "cpu"), "mixed": mixed}[kind]
    expected = reference.trace(CONFIG, floats(whole if kind != "prepared" else int4), TOKENS[0])
    where = NoCache().begin(9)
    for number in (1, 2):
        block = whole.layer(number)
        before_BTD = jnp.asarray(expected.hidden[number - 1][None], jnp.float32)
        after_BTD, _ = block(before_BTD, where, NoCache(), Layer(number))
        np.testing.assert_allclose(after_BTD[0], expected.hidden[number], atol=5e-5)


def test_another_layer(model: Llama, weights: reference.Weights) -> None:
    """A layer of another model can replace one; the first model stays unchanged."""
    other = random_model(CONFIG, seed=1)
    theirs = weights_of(other)
    swapped = model.with_layer(1, other.layer(2))
    expected = weights | {
        name: theirs[name.replace("layers.1.", "layers.2.")] for name in weights if "layers.1." in name
    }
    np.testing.assert_allclose(swapped(TOKENS)[0], logits_of(expected), atol=1e-4)
    np.testing.assert_allclose(model(TOKENS)[0], logits_of(weights), atol=1e-4)
    assert jax.tree.structure(swapped) == jax.tree.structure(model)


@pytest.mark.parametrize("laid_out", [False, True])
def test_another_layer_of_a_packed_model(model: Llama, int4: Llama, laid_out: bool) -> None:
    """A layer of floats makes stacks of two types; a layer of the same model leaves one type."""
    packed = prepare(int4, "cpu") if laid_out else int4
    ours, theirs = floats(int4), weights_of(model)
    moved = packed.with_layer(0, packed.layer(2))
    expected = ours | {name: ours[name.replace("layers.0.", "layers.2.")] for name in ours if "layers.0." in name}
    np.testing.assert_allclose(moved(TOKENS)[0], logits_of(expected), atol=2e-4)
    one = named_weights(moved)["layers.*.ffn.up_DF"]
    assert not isinstance(one, Mixed)

    mixed = packed.with_layer(1, model.layer(1))
    expected = ours | {name: theirs[name] for name in ours if "layers.1." in name}
    np.testing.assert_allclose(mixed(TOKENS)[0], logits_of(expected), atol=2e-4)
    weight = named_weights(mixed)["layers.*.ffn.up_DF"]
    assert isinstance(weight, Mixed) and weight.types == (0, 1, 0) and is_laid_out(mixed) == laid_out


def test_a_layer_that_there_is_not(model: Llama) -> None:
    for call in (lambda: model.layer(3), lambda: model.layer(-1), lambda: model.with_layer(3, model.layer(0))):
        with pytest.raises(LlamaJaxError, match=r"layer (3|-1): the model has layers 0 to 2"):
            call()


def test_a_layer_of_another_config(model: Llama) -> None:
    """It is refused even where its weights would fit, since their heads would be split otherwise."""
    for change in ({"ffn_width": 40}, {"num_heads": 2, "num_kv_heads": 1, "head_size": 16}):
        other = random_model(Config(**{**CONFIG.__dict__, **change}))
        with pytest.raises(LlamaJaxError, match=r"layer 2: a Block of another config, .* a Block of a model with Conf"):
            model.with_layer(2, other.layer(0))


# ---- Memory of gradients --------------------------------------------------------------------------------------------


def test_remat_of_layers_needs_less_memory_for_the_same_gradients() -> None:
    """With eight layers it needs less than half: the layers' inputs, and the values of one layer at a time."""
    config = Config(**{**CONFIG.__dict__, "num_layers": 8, "width": 64, "ffn_width": 256})
    model = random_model(config)
    tokens_BT = np.random.default_rng(1).integers(0, 50, (4, 64)).astype(np.int32)

    def compiled(remat: str | None):
        def loss(model):
            log_BTV = jax.nn.log_softmax(model(tokens_BT[:, :-1], remat=remat)[0])
            return -jnp.mean(jnp.take_along_axis(log_BTV, tokens_BT[:, 1:, None], axis=-1))

        return jax.jit(jax.grad(loss)).lower(model).compile(compiler_options=QUICK)

    kept, remade = compiled(None), compiled("layer")
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (kept, remade)]
    assert sizes[0] > 2 * sizes[1], sizes
    expected = jax.jit(jax.grad(lambda model: next_token_losses(model, tokens_BT).mean()), compiler_options=QUICK)(
        model
    )
    for gradient in (kept(model), remade(model)):
        for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


# ---- repr -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["floats", "int4", "prepared", "mixed", "abstract"])
def test_repr_fits_a_screen_and_counts_weights(model: Llama, int4: Llama, kind: str) -> None:
    """The shapes are those of the weights in any form, and add up to their number."""
    shown = {
        "floats": lambda: model,
        "int4": lambda: int4,
        "prepared": lambda: prepare(int4, "cpu"),
        "mixed": lambda: int4.with_layer(1, model.layer(1)),
        "abstract": lambda: abstract_model(CONFIG, jnp.bfloat16),
    }[kind]()
    text = repr(shown)
    first, *lines = text.splitlines()
    assert len(lines) < 40 and max(map(len, lines)) <= 120 and str(shown) == text
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert first == f"Llama of {count:,} weights in 3 layers"
    shapes = [re.match(r"  \S+ +(\d+(?: x \d+)*) +\w", line)[1] for line in lines]
    assert sum(int(np.prod([int(size) for size in shape.split(" x ")])) for shape in shapes) == count
    made_of = {"floats": "float32", "abstract": "bfloat16", "prepared": "groups of 8, laid out"}
    (line,) = (line for line in lines if "ffn.up_DF" in line)
    assert made_of.get(kind, "int4, groups of 8") in line and ("float32" in line) == (kind in ("floats", "mixed"))
    assert " at 0x" not in text
