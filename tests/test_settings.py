"""Settings that researchers use: x64, strict promotion, meshes of Explicit axes, patched code, `jax.export`."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import llamajax
from llamajax import Config, KVCache, Llama, clear_programs, fresh_programs, generate, prepare, quantize
from llamajax.caches import CACHE_DTYPES, RingPart
from llamajax.model import Block
from quant import Rule
from tests.reference import random_model

PROMPTS = [[1, 270, 300, 12, 12, 281] * 4, [7]]


@pytest.fixture
def strict_x64() -> Iterator[None]:
    """Enables x64 and strict promotion with empty caches, so that earlier traces hide no failure."""
    jax.clear_caches()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield
    jax.clear_caches()


def _made(model: Llama, **options) -> list[list[int]]:
    options = {"temperature": 0, "max_new_tokens": 6} | options
    return [row.tokens for row in generate(model, None, PROMPTS, **options)]


@pytest.mark.matrix
@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "int4"])
def test_generating_under_x64_and_strict_promotion(cache_dtype: str, tiny_model: Llama, request) -> None:
    """Generation gives the same tokens, also with seeds, and computes nothing in float64."""
    warm = {"temperature": [0, 0.8], "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 5}
    expected = _made(tiny_model, cache_dtype=cache_dtype), _made(tiny_model, cache_dtype=cache_dtype, **warm)
    request.getfixturevalue("strict_x64")
    assert (_made(tiny_model, cache_dtype=cache_dtype), _made(tiny_model, cache_dtype=cache_dtype, **warm)) == expected
    cache = KVCache.empty(tiny_model.config, 2, 8, cache_dtype)
    logits_BTV, cache = jax.jit(lambda m, t, c: m(t, c))(tiny_model, np.ones((2, 4), np.int64), cache)
    assert logits_BTV.dtype == jnp.float32 and cache.length_B.dtype == jnp.int32


@pytest.mark.matrix
@pytest.mark.parametrize("prepared", [False, True])
def test_quantized_models_and_drafts_under_x64(prepared: bool, tiny_int4: Llama, request) -> None:
    model = prepare(tiny_int4) if prepared else tiny_int4
    expected = _made(model)
    request.getfixturevalue("strict_x64")
    assert _made(model) == _made(model, speculate=3) == expected


# ---- Meshes ----------------------------------------------------------------------------------------------------------


def test_a_mesh_of_explicit_axes(tiny_model: Llama) -> None:
    """The mesh has one device, which every machine has; arrays have the same types as on several devices."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    spread = lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "x")))  # noqa: E731
    model, tokens_BT = jax.tree.map(spread, tiny_model), jnp.asarray([PROMPTS[0]])
    expected = np.asarray(tiny_model(tokens_BT)[0])
    cached, cache = model(tokens_BT, KVCache.empty(model.config, 1, 32))
    for logits_BTV in (model(tokens_BT)[0], cached):
        np.testing.assert_allclose(logits_BTV, expected, atol=1e-4)
        assert logits_BTV.sharding.mesh == mesh
    assert cache is not None and cache.length_B.tolist() == [24]
    made = _made(tiny_model)
    assert _made(model) == made
    with jax.set_mesh(mesh):
        assert _made(model) == made


_DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import llamajax
from llamajax import KVCache, generate, next_token_losses
assert len(jax.devices()) == 4
model, _ = llamajax.load(sys.argv[1])
tokens_BT = jnp.asarray([[1, 270, 300, 12], [1, 7, 8, 9]])
expected = np.asarray(model(tokens_BT)[0])
made = generate(model, None, [1, 270], max_new_tokens=4, temperature=0).tokens
mesh = jax.make_mesh((2, 2), ("data", "model"))
assert mesh.axis_types == (jax.sharding.AxisType.Explicit,) * 2
spread = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P(*[None] * (a.ndim - 1), "model"))), model)
rows = jax.device_put(tokens_BT, NamedSharding(mesh, P("data", None)))
def check():
    for tokens in (tokens_BT, rows):
        logits, _ = jax.jit(lambda m, t, c: m(t, c))(spread, tokens, KVCache.empty(model.config, 2, 8))
        np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert logits.sharding.spec[0] == "data", logits.sharding
    for options in ({}, {"speculate": 2}):
        assert generate(spread, None, [1, 270], max_new_tokens=4, temperature=0, **options).tokens == made
check()
with jax.set_mesh(mesh):
    check()
    gradient = jax.grad(lambda m: next_token_losses(m, rows).mean())(spread)
    expected = jax.grad(lambda m: next_token_losses(m, tokens_BT).mean())(model)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
"""


@pytest.mark.exhaustive
def test_several_devices_of_explicit_axes(tiny_model: Llama, tmp_path: Path) -> None:
    llamajax.save_checkpoint(tiny_model, tmp_path / "saved")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _DEVICES, str(tmp_path / "saved")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- Replaced code ---------------------------------------------------------------------------------------------------


def test_a_patched_block_is_seen(tiny_model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _made(tiny_model)
    monkeypatch.setattr(Block, "__call__", lambda self, x_BTD, where, cache, at: (x_BTD, cache))
    with fresh_programs():
        patched = _made(tiny_model)
    assert patched != made == _made(tiny_model), "without fresh_programs, programs are found by shapes"
    monkeypatch.undo()
    clear_programs()
    assert _made(tiny_model) == made


# ---- jax.export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*CACHE_DTYPES, "tiled"])
def test_functions_of_a_model_are_written_and_read(dtype: str, tiny_config: Config) -> None:
    """For each kind of cache, in a model that has rings too; where the cache has codes, the model has them too."""
    config = dataclasses.replace(tiny_config, layer_kinds=("window", "full"), window=8)
    model, tokens_BT = random_model(config), jnp.asarray([PROMPTS[0]])
    if "int" in dtype:
        model = quantize(model, (Rule(weights="*norm*", keep=True), Rule(weights="*", scheme="int4", group_size=8)))
    layout = {"layout": "tiled", "dtype": "float32"} if dtype == "tiled" else {"dtype": dtype}
    cache = KVCache.empty(config, 1, 256, **layout)
    assert any(RingPart in (type(part), type(getattr(part, "held", None))) for part in cache.parts)
    step = jax.jit(lambda model, tokens_BT, cache: model(tokens_BT, cache))
    data = jax.export.export(step)(model, tokens_BT, cache).serialize()
    read = jax.export.deserialize(data)
    assert read.in_tree == jax.tree.structure(((model, tokens_BT, cache), {}))
    logits_BTV, after = read.call(model, tokens_BT, cache)
    np.testing.assert_allclose(logits_BTV, step(model, tokens_BT, cache)[0], atol=1e-5)
    assert isinstance(after, KVCache) and after.length_B.tolist() == [24]
