"""`Opened.outcome` predicts what `Opened.read` returns (structure, shapes and types) before any weight is read."""

from pathlib import Path

import jax
import numpy as np
import pytest

import llamajax
from llamajax import Llama, LlamaJaxError, open_checkpoint, save_checkpoint
from llamajax.quantization.quantize import quantize
from quant import is_laid_out
from quant.recipe import Rule
from tests.test_llama2c import _meta_weights, _write_v0, _write_v1, _write_v2
from tests.test_version1 import unpacked

PACKED = ("int4", "mixed", "version 1, int4", "version 1, runs")
FLOATS = ("llamajax", "huggingface", "llama2c 0", "llama2c 1", "llama2c 2", "version 1, tied", "version 1, bfloat16")


@pytest.fixture(scope="module")
def folder(tiny_model: Llama, tiny_int4: Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes one checkpoint of every format into a folder."""
    folder = tmp_path_factory.mktemp("formats")
    save_checkpoint(tiny_model, folder / "llamajax")
    save_checkpoint(tiny_model, folder / "huggingface", form="huggingface")
    save_checkpoint(tiny_int4, folder / "int4")
    rules = (
        Rule(weights="*norm*", keep=True),
        Rule(weights="*gate*", layers=(0,), keep=True),
        Rule(weights="layers.*", layers=(0,), scheme="int8", group_size=8),
        Rule(weights="*", scheme="uint4", group_size=8),
    )
    save_checkpoint(quantize(tiny_model, rules), folder / "mixed")
    weights = _meta_weights(np.random.default_rng(0))
    _write_v0(folder / "llama2c 0", weights, True)
    _write_v1(folder / "llama2c 1", weights, False)
    _write_v2(folder / "llama2c 2", weights, True)
    for name in ("int4", "runs", "tied", "bfloat16"):
        unpacked(name, folder / "version 1").rename(folder / f"version 1, {name}")
    return folder


CASES = [
    *(
        (name, dtype, backend, None)
        for name in FLOATS
        for dtype in (None, "bfloat16", "float16")
        for backend in (None, "cpu")
    ),
    *(
        (name, dtype, backend, activations)
        for name in PACKED
        for dtype in (None, "bfloat16")
        for backend in (None, "cpu")
        for activations in (None, "bfloat16", "int8", "float32")
    ),
]


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "dtype", "backend", "activations"), CASES)
def test_outcome_is_what_is_read(
    name: str, dtype: str | None, backend: str | None, activations: str | None, folder: Path
) -> None:
    opened = open_checkpoint(folder / name)
    outcome, model = (
        opened.outcome(dtype, backend, activations),
        opened.read(dtype, None, backend=backend, activations=activations),
    )
    assert jax.tree.structure(outcome) == jax.tree.structure(model)
    for shape, array in zip(jax.tree.leaves(outcome), jax.tree.leaves(model), strict=True):
        assert isinstance(shape, jax.ShapeDtypeStruct) and isinstance(array, jax.Array)
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
    assert is_laid_out(model) == (backend == "cpu" and name in PACKED)
    assert dtype is None or {model.norm.weight_D.dtype.name} == {dtype}


def test_what_cannot_be_is_refused_before_anything_is_read(folder: Path) -> None:
    opened = open_checkpoint(folder / "llamajax")
    done: list[int] = []
    for ask in (
        lambda **options: opened.outcome(**options),
        lambda **options: opened.read(on_weight=lambda *n: done.append(1), **options),
    ):
        with pytest.raises(LlamaJaxError, match="'int8' for a model without quantized weights"):
            ask(activations="int8")
        with pytest.raises(LlamaJaxError, match="activations 'int2': expected one of float32, bfloat16, int8"):
            ask(activations="int2")
    assert not done


def test_it_is_what_prepare_makes_of_it(folder: Path) -> None:
    opened = open_checkpoint(folder / "mixed")
    prepared = llamajax.prepare(opened.read(), "cpu")
    assert jax.tree.structure(prepared) == jax.tree.structure(opened.outcome(backend="cpu"))
