"""`benchmarks/distil.py` on a tiny model: noise up to half a step, gains by regression, resumption."""

import types
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import llamajax
import quant
from llamajax.evaluation.evaluate import compare
from llamajax.evaluation.windows import gptq_windows
from llamajax.quantization.quantize import quantize
from llamajax.quantization.resume import PartsOnDisk
from llamajax.train import TrainOptions
from tests.scripts import script

KEPT = quant.Rule(weights="*norm*", keep=True), quant.Rule(weights="head_VD", keep=True)
RULES = (*KEPT, quant.Rule(weights="*", scheme="uint4", group_size=8))
OPTIONS = TrainOptions(
    steps=6, batch=2, sequence_length=32, learning_rate=1e-4, warmup=1, weight_decay=0.0, eval_every=2
)


@pytest.fixture(scope="module")
def distil() -> Iterator[types.ModuleType]:
    """The script as a module that can import the scripts beside it."""
    with script("distil") as module:
        yield module


@pytest.fixture(scope="module")
def packed(tiny_model: llamajax.Llama) -> llamajax.Llama:
    return quantize(tiny_model, RULES)


@pytest.fixture(scope="module")
def tokens(tiny_config: llamajax.Config) -> np.ndarray:
    """A text that repeats itself: inputs of the matrices have directions that they prefer, and its end is like it."""
    return np.tile(np.random.default_rng(3).integers(0, 12, 64), 32).astype(np.int32)


def test_noise_is_as_wide_as_a_step(distil, packed: llamajax.Llama) -> None:
    noisy = llamajax.named_arrays(distil.noisy(packed, seed=0))
    for name, weight in llamajax.named_weights(packed).items():
        if not isinstance(weight, quant.QTensor):
            np.testing.assert_array_equal(noisy[name], weight)
            continue
        step = np.repeat(np.asarray(weight.scale, np.float32), 8, axis=weight.axis)
        moved = (np.asarray(noisy[name]) - np.asarray(quant.dequantize(weight))) / step
        assert 0.45 < np.abs(moved).max() <= 0.501 and abs(moved.mean()) < 0.05
        assert moved.std() == pytest.approx(12**-0.5, rel=0.1)
    other = llamajax.named_arrays(distil.noisy(packed, seed=1))
    assert not np.array_equal(noisy["embed_VD"], other["embed_VD"])


def test_noise_of_mixed_layers_with_scales_of_two_levels(distil, tiny_model: llamajax.Llama) -> None:
    """As in the file of Gemma 3, Q4_K_M: layers of several types in one stack, scales in codes."""
    first = quant.Rule(weights="layers.0.ffn.*", scheme="int8", group_size=8)
    rest = quant.Rule(weights="*", scheme="uint4", group_size=8, scale_scheme="uint8", scale_group="channel")
    packed = quantize(tiny_model, (*KEPT, first, rest))
    noisy = llamajax.named_arrays(distil.noisy(packed, seed=0))
    mixed = 0
    for name, weight in llamajax.named_weights(packed).items():
        if not isinstance(weight, quant.Mixed):
            continue
        mixed += 1
        for layer in range(len(weight.types)):
            one = weight.take(layer)
            assert isinstance(one.scale, quant.QTensor) == (layer > 0)
            scale = np.asarray(quant.dequantize(one.scale) if layer else one.scale, np.float32)
            floats, step = np.asarray(quant.dequantize(one)), np.repeat(scale, 8, axis=weight.axis)
            moved = np.asarray(noisy[name][layer]) - floats
            assert np.all(np.abs(moved) <= 0.501 * np.abs(step))
            assert np.abs(moved[step != 0] / step[step != 0]).max() > 0.45
    assert mixed == 3  # gate, up, down


def test_noise_needs_evenly_spaced_values(distil, tiny_model: llamajax.Llama) -> None:
    packed = quantize(tiny_model, (*KEPT, quant.Rule(weights="*", scheme="nf4", group_size=8)))
    with pytest.raises(llamajax.LlamaJaxError, match="codes in nf4: expected evenly spaced values"):
        distil.noisy(packed, seed=0)


def test_regression_takes_off_what_outputs_show(distil, packed: llamajax.Llama, tokens: np.ndarray) -> None:
    teacher, student = distil.in_floats(packed), distil.noisy(packed, seed=0)
    student = jax.tree.map(lambda leaf, theirs: theirs if leaf.ndim == 2 else leaf, student, teacher)  # no layer's
    nearer, left = distil.regressed(student, teacher, tokens, kept=0.3)
    assert left == pytest.approx(0.3, abs=0.15)
    windows = gptq_windows(tokens, 512)
    before, after = (compare(model, teacher, windows).kl_divergence for model in (student, nearer))
    assert after < 0.6 * before


def test_a_stopped_run_ends_as_one_that_was_not(
    distil, packed: llamajax.Llama, tokens: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "_MOST_AWAY", -1.0)  # never near enough: all steps are done
    teacher, student = distil.in_floats(packed), distil.noisy(packed, seed=0)
    heldout, seen = gptq_windows(tokens[-512:], 512), tokens[:-512]
    results = {}
    for name, stops in {"whole": (), "stopped": (3, 5)}.items():
        parts = PartsOnDisk(tmp_path / name, {"of": "a test"})
        for stop in (*stops, None):
            run = distil.Distillation(student, teacher, OPTIONS)
            if stop is not None:
                made, take = iter(range(stop)), run.step
                monkeypatch.setattr(run, "step", lambda rows, made=made, take=take: (next(made), take(rows))[1])
            try:
                results[name] = (*distil.train(run, seen, heldout, OPTIONS, parts), run.arrays())
            except StopIteration:
                assert stop is not None
    (whole, steps, arrays), (again, _, others) = results["whole"], results["stopped"]
    assert steps == 6 and whole == again
    assert whole.kl_divergence < compare(student, teacher, heldout).kl_divergence
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, others[key], err_msg=key)


def test_a_run_ends_where_it_is_near_enough(distil, packed: llamajax.Llama, tokens: np.ndarray, tmp_path: Path) -> None:
    teacher = distil.in_floats(packed)
    run = distil.Distillation(teacher, teacher, OPTIONS)
    _, steps = distil.train(run, tokens[:-512], gptq_windows(tokens[-512:], 512), OPTIONS, PartsOnDisk(tmp_path, {}))
    assert steps == 0


def test_windows_begin_with_bos(
    distil, packed: llamajax.Llama, tokens: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the regression and of each step; the rest of a window stays as it is in the text."""
    monkeypatch.setattr(distil, "_MOST_AWAY", -1.0)
    teacher, student = distil.in_floats(packed), distil.noisy(packed, seed=0)
    run, seen = distil.Distillation(student, teacher, OPTIONS), []
    monkeypatch.setattr(run, "step", lambda rows: seen.append(rows) or 0.0)
    ids, parts = np.where(tokens == 1, 2, tokens), PartsOnDisk(tmp_path, {})
    distil.train(run, ids[:-512], gptq_windows(ids[-512:], 512), OPTIONS, parts, bos_id=1)
    assert len(seen) == OPTIONS.steps
    for rows in seen:
        assert (rows[:, 0] == 1).all() and (rows[:, 1:] != 1).all()
    without, with_bos = (distil.regressed(student, teacher, ids, 0.3, bos_id)[0] for bos_id in (None, 1))
    assert not jax.tree.all(jax.tree.map(np.array_equal, without, with_bos))
