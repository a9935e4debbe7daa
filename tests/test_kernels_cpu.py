"""The CPU lowering: products of tiles against NumPy's in float64, compiled programs, and whole models."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llamajax
import quant
from llamajax.parameters import named_weights
from llamajax.quantization.quantize import quantize
from quant import QTensor
from quant.kernels import cpu
from tests.fuzz import fuzz
from tests.programs import forward

SCHEMES = ("int4", "int8", "int3", "int2", "ternary", "uint4", "int5", "int6", "int7", "uint8")


def made(name: str, group: int, groups: int, outputs: int, axis: int, seed: int = 0, lead: tuple[int, ...] = ()):
    """Returns a QTensor of random codes with every plane that tiles can hold, and its weight [..., K, M] in float64."""
    rng, scheme, K = np.random.default_rng(seed), quant.SCHEMES[name], group * groups
    codes = rng.integers(0, scheme.max_code + 1, (*lead, K, outputs), np.uint8)
    scale = rng.normal(size=(*lead, groups, outputs)).astype(np.float16)
    order = np.argsort(rng.random((*lead, K)), axis=-1)
    value = codes.astype(np.float64) - {"int": 2 ** (scheme.bits - 1), "ternary": 1, "uint": 0}[scheme.kind]
    parts = {"order": order[..., None].astype(np.int32)}
    if scheme.kind == "uint":
        parts["zero"] = rng.integers(0, 2**scheme.bits, scale.shape, np.uint8)
        parts["offset"] = rng.normal(size=scale.shape).astype(np.float32)
    wide = {
        key: np.repeat(parts.get(key, np.zeros(scale.shape)).astype(np.float64), group, -2)
        for key in ("zero", "offset")
    }
    stored = (value - wide["zero"]) * np.repeat(scale.astype(np.float64), group, -2) + wide["offset"]
    weight_KM = np.empty_like(stored)
    np.put_along_axis(weight_KM, np.broadcast_to(order[..., None], stored.shape), stored, axis=-2)
    arrays = {"codes": codes, "scale": scale, **parts}
    if axis == -1:
        arrays = {key: array.swapaxes(-1, -2) for key, array in arrays.items()}
    arrays = {key: jnp.asarray(array) for key, array in arrays.items()}
    return QTensor.from_codes(arrays.pop("codes"), arrays.pop("scale"), scheme, axis=axis, **arrays), weight_KM


def bound(x_RK: np.ndarray, qtensor: QTensor) -> np.ndarray:
    """Returns the bound in the docstring of `matmul`, [R, M], with one scale per group and output."""
    terms_RM = np.abs(x_RK).sum(-1, keepdims=True) * largest(qtensor)
    return (x_RK.shape[1] + 16) * 2.0**-24 * terms_RM


def largest(qtensor: QTensor) -> float:
    """Returns the largest possible term of the sums when an activation is 1."""
    codes = 2.0**qtensor.scheme.bits + (0 if qtensor.zero is None else 255)
    offset = 0 if qtensor.offset is None else float(jnp.abs(qtensor.offset).max())
    return 2 * (16 * codes * float(jnp.abs(qtensor.scale).max()) + offset)


@fuzz(60)
@given(
    name=st.sampled_from(SCHEMES),
    group=st.sampled_from([32, 64, 128, 256]),
    groups=st.integers(1, 7),
    outputs=st.integers(1, 40),
    axis=st.sampled_from([-2, -1]),
    rows=st.sampled_from([1, 2, 5, cpu.MAX_UNROLLED_ROWS, cpu.MAX_UNROLLED_ROWS + 1, 40, cpu.MIN_WHOLE_ROWS]),
    activations=st.sampled_from([None, "bfloat16"]),
    seed=st.integers(0, 9),
)
def test_product_is_numpys(
    name: str, group: int, groups: int, outputs: int, axis: int, rows: int, activations: str | None, seed: int
) -> None:
    qtensor, weight_KM = made(name, group, groups, outputs, axis, seed)
    x_RK = np.random.default_rng(seed).standard_normal((rows, group * groups)).astype(np.float32)
    tiled = cpu.layout(dataclasses.replace(qtensor, activations=activations))
    y_RM = quant.product(jnp.asarray(x_RK), tiled, axis=axis)
    assert y_RM.dtype == jnp.float32
    off_RM = bound(x_RK, qtensor)
    if activations == "bfloat16":
        x_RK = x_RK.astype(jnp.bfloat16).astype(np.float32)
        if rows > cpu.MAX_UNROLLED_ROWS:
            off_RM = off_RM + 2.0**-9 * np.abs(x_RK) @ np.abs(weight_KM)
    assert np.all(np.abs(np.asarray(y_RM, np.float64) - x_RK.astype(np.float64) @ weight_KM) <= off_RM)


def test_bfloat16_activations_keep_the_gradient_of_scales() -> None:
    """Gradients ignore rounding, also to integers: they are those of exact products, to 8 bits of precision."""
    qtensor, _ = made("int4", 32, 2, 16, -2)
    qtensor = dataclasses.replace(qtensor, order=None)
    x_RK = jnp.asarray(np.random.default_rng(1).standard_normal((cpu.MAX_UNROLLED_ROWS + 1, 64)), jnp.float32)

    def total(scale: jax.Array, activations: str | None) -> jax.Array:
        weight = dataclasses.replace(qtensor, scale=scale, activations=activations)
        return jnp.sum(quant.product(x_RK, cpu.layout(weight)))

    exact, rounded = (jax.grad(total)(qtensor.scale, kind) for kind in (None, "bfloat16"))
    assert float(jnp.abs(exact).max()) > 1
    np.testing.assert_allclose(rounded, exact, atol=0.02 * float(jnp.abs(exact).max()))


@pytest.mark.matrix
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("name", SCHEMES)
def test_layout_loses_nothing(name: str, axis: int) -> None:
    """Every array comes back bit for bit, from a stack whose outputs do not fill the tiles."""
    qtensor, _ = made(name, 64, 3, 21, axis, lead=(2,))
    tiled = cpu.layout(qtensor)
    assert (tiled.shape, tiled.ndim, tiled.size, tiled.dtype) == (qtensor.shape, 3, qtensor.size, qtensor.dtype)
    assert tiled.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(tiled))
    back = cpu.restore(tiled).validate()
    assert jax.tree.structure(back) == jax.tree.structure(qtensor)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(qtensor), strict=True):
        np.testing.assert_array_equal(one, other)


def test_two_levels_and_one_scale_for_all_become_a_scale_per_group() -> None:
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 16, (128, 20), np.uint8))
    inner = QTensor.from_codes(
        jnp.asarray(rng.integers(0, 64, (4, 20), np.uint8)), jnp.ones((1, 20), jnp.float16) / 4, quant.SCHEMES["uint6"]
    )
    for scale in (inner, jnp.asarray([[0.5]], jnp.float32)):
        qtensor = QTensor.from_codes(codes, scale, quant.SCHEMES["int4"])
        tiled = cpu.layout(qtensor)
        assert tiled.group_size == qtensor.group_size
        np.testing.assert_array_equal(quant.dequantize(cpu.restore(tiled)), quant.dequantize(qtensor))


def test_rows_of_a_table_are_its_own() -> None:
    qtensor, weight_KM = made("int4", 32, 3, 37, -1)
    ids = jnp.asarray([[0, 36, 16], [15, -1, 17]])
    rows = quant.rows(cpu.layout(qtensor), ids)
    np.testing.assert_allclose(rows, weight_KM.T[np.asarray(ids)], rtol=1e-6)
    assert jnp.isnan(quant.rows(cpu.layout(qtensor), jnp.asarray([37]))).all()


@pytest.mark.parametrize("rows", [3, 40])
def test_layers_of_a_stack(rows: int) -> None:
    """In a scan, by number, and under vmap, each product uses the layer's own weight."""
    qtensor, weight_LKM = made("int3", 32, 4, 18, -2, lead=(3,))
    x_RK = np.random.default_rng(1).standard_normal((rows, 128)).astype(np.float32)
    tiled, expected_LRM = cpu.layout(qtensor), x_RK.astype(np.float64) @ weight_LKM

    def step(carry, layer, place, numbers):
        return carry.at[place].set(quant.product(jnp.asarray(x_RK), layer["w"])), place

    scanned_LRM, places_L = jax.jit(lambda w: quant.scan_layers(step, jnp.zeros((3, rows, 18)), {"w": w}))(tiled)
    assert places_L.tolist() == [0, 1, 2]
    np.testing.assert_allclose(scanned_LRM, expected_LRM, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(
        scanned_LRM[1], tiled.at_layer(jnp.asarray(1)).matmul(jnp.asarray(x_RK)), rtol=1e-4, atol=1e-4
    )
    mapped = jax.vmap(lambda x: quant.product(x, tiled.at_layer(jnp.asarray(2))))(jnp.asarray(x_RK)[:, None])
    np.testing.assert_allclose(mapped[:, 0], expected_LRM[2], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [2, 40])
def test_gradient_is_the_transposed_product(rows: int) -> None:
    qtensor, weight_KM = made("uint4", 32, 2, 18, -2)
    x_RK, cotangent_RM = (np.random.default_rng(i).standard_normal((rows, n)) for i, n in enumerate((64, 18)))
    tiled = cpu.layout(qtensor)

    def loss(x_RK):
        return jnp.sum(quant.product(x_RK, tiled) * jnp.asarray(cotangent_RM, jnp.float32))

    gradient_RK = jax.grad(loss)(jnp.asarray(x_RK, jnp.float32))
    np.testing.assert_allclose(gradient_RK, cotangent_RM @ weight_KM.T, rtol=1e-3, atol=1e-3)


def test_rounded_activations_of_several_axes_are_the_references() -> None:
    qtensor, _ = made("int4", 32, 4, 18, -2)
    qtensor = dataclasses.replace(qtensor, order=None, activations="int8-group")
    x_BTK = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 128)), jnp.float32)
    tiled = cpu.layout(qtensor)
    expected_BTM = quant.product(x_BTK, qtensor)
    assert expected_BTM.shape == (2, 3, 18)
    np.testing.assert_allclose(quant.product(x_BTK, tiled), expected_BTM, rtol=1e-4, atol=1e-4)


def test_what_has_no_layout_stays_as_it_is() -> None:
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((64, 32)), jnp.float32)
    table = quant.split_outliers(weight, jnp.asarray([3]), lambda w: quant.quantize_rtn(w, "int4", group_size=32))
    assert quant.prepare(table, "cpu") is table and quant.prepare(weight, "cpu") is weight
    assert quant.prepare(quant.quantize_rtn(weight, "int4", group_size=32), "no such backend").axis == -2
    with pytest.raises(ValueError, match=r"shape \(64, 32\) cannot be laid out as tiles: it has outlier channels"):
        cpu.layout(table)


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_every_backend_has_a_layout(backend: str) -> None:
    """It can be made on any machine; arrays that it shares with the original weight are not freed."""
    weight_KM = jnp.asarray(np.random.default_rng(0).standard_normal((64, 32)), jnp.float32)
    expected_KM = np.asarray(quant.dequantize(quant.quantize_rtn(weight_KM, "int4", group_size=32)))
    made = quant.prepare(quant.quantize_rtn(weight_KM, "int4", group_size=32), backend, donate=True)
    np.testing.assert_array_equal(quant.dequantize(made.restore()), expected_KM)
    assert (made.shape, made.ndim, made.size, made.axis, made.group_size) == ((64, 32), 2, 2048, -2, 32)


def test_few_rows_write_no_float_weight(tiny_model: llamajax.Llama) -> None:
    """The compiled product's temporaries are small compared with the packed weight, and so are copies of operands."""
    qtensor, _ = made("int4", 32, 16, 2048, -2, lead=(4,))
    tiled = cpu.layout(dataclasses.replace(qtensor, order=None))
    x_1K = jnp.ones((1, 512))
    step = lambda carry, layer, *_: (carry + quant.product(carry, layer)[:, :512], None)  # noqa: E731
    program = jax.jit(lambda x, w: quant.scan_layers(step, x, w)).lower(x_1K, tiled).compile()
    assert program.memory_analysis().temp_size_in_bytes < tiled.nbytes / 4 / 2
    largest = max(int(n) for n in re.findall(r"= f32\[(\d+),\d+,\d+\]", program.as_text()) or ["0"])
    assert largest <= 2048 // cpu.LANES


# ---- Whole models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed() -> llamajax.Llama:
    """A tied model, wide enough for groups of 32: the table is looked up and multiplied with."""
    config = llamajax.Config(
        vocab_size=70, width=64, ffn_width=96, num_layers=3, num_heads=4, num_kv_heads=2, head_size=16,
        context_length=512, tied_embeddings=True,
    )  # fmt: skip
    model = llamajax.Llama(config, key=jax.random.key(0))
    model = jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 2 else leaf, model)
    return quantize(model, "int4-g32")


def test_a_prepared_model_says_the_same(packed: llamajax.Llama) -> None:
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 70, (2, 30)))
    expected = forward(packed, tokens_BT)
    prepared = llamajax.prepare(packed, "cpu")
    assert isinstance(prepared.embed_VD.get_value(), cpu.TiledWeight)
    np.testing.assert_allclose(forward(prepared, tokens_BT), expected, rtol=1e-3, atol=2e-5)
    np.testing.assert_allclose(forward(prepared, tokens_BT[:1, :3]), expected[:1, :3], rtol=1e-3, atol=2e-5)


def test_a_prepared_model_is_not_saved(packed: llamajax.Llama, tmp_path: Path) -> None:
    with pytest.raises(llamajax.LlamaJaxError, match="in the layout of a backend: save the model as it was before"):
        llamajax.save_checkpoint(llamajax.prepare(packed, "cpu"), tmp_path / "prepared")
    assert not any(tmp_path.iterdir())


def test_preparing_may_free_what_it_was_given(packed: llamajax.Llama) -> None:
    copy = jax.tree.map(jnp.array, packed)
    kept = llamajax.prepare(copy, "cpu")
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(copy))
    given = llamajax.prepare(copy, "cpu", donate=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(named_weights(copy)["layers.*.ffn.up_DF"]))
    for one, other in zip(jax.tree.leaves(given), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(one, other)


def test_generation_is_the_references(packed: llamajax.Llama) -> None:
    """Greedy tokens agree for short and long prompts: few rows, many rows, batches."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 70, n).tolist() for n in (1, 5, 90)]
    options = {"max_new_tokens": 12, "temperature": 0}
    expected = llamajax.generate(packed, None, prompts, **options)
    assert [c.tokens for c in llamajax.generate(llamajax.prepare(packed, "cpu"), None, prompts, **options)] == [
        c.tokens for c in expected
    ]
