"""RoPE scalings as GGUF keys and tensors: what is written is read, what is refused, what llama.cpp computes."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamajax import Config, LlamaJaxError, Rope, RopeScaling, open_checkpoint, save_checkpoint
from llamajax.rope import rope_attention_factor
from tests.gguf_files import write
from tests.programs import forward
from tests.reference import random_model

CONFIG = Config(
    vocab_size=512,
    width=64,
    ffn_width=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_size=32,
    context_length=2048,
)
SHORT = tuple(1 + i / 16 for i in range(16))
LONG = tuple(1.0 + 2 * i for i in range(16))
YARN = RopeScaling(kind="yarn", factor=8.0, original_context_length=256)
LONGROPE = RopeScaling(kind="longrope", factor=8.0, original_context_length=256, short_factors=SHORT, long_factors=LONG)
SCALINGS = {
    "linear": RopeScaling(kind="linear", factor=4.0),
    "llama3": RopeScaling(kind="llama3", factor=8.0, original_context_length=256),
    "yarn": YARN,
    "yarn, its own factor": dataclasses.replace(YARN, attention_factor=1.5),
    "yarn, mscale": dataclasses.replace(YARN, mscale=0.7, mscale_all_dim=1.0),
    "longrope": LONGROPE,
    "longrope, its own factor": dataclasses.replace(LONGROPE, attention_factor=1.25),
    "longrope of Phi-3": LONGROPE,
}


def _config(name: str) -> Config:
    scaling = SCALINGS[name]
    if "Phi-3" not in name:
        return dataclasses.replace(CONFIG, rope_scaling=scaling)
    scaling = dataclasses.replace(scaling, short_factors=SHORT[:12], long_factors=LONG[:12])
    return dataclasses.replace(CONFIG, rope_scaling=scaling, rope_fraction=0.75, family="phi3")


def _saved(folder: Path, config: Config) -> Path:
    save_checkpoint(random_model(config), folder / "m.gguf", form="gguf")
    return folder / "m.gguf"


@pytest.mark.parametrize("name", SCALINGS)
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    """An attention factor other than the paper's is read as a number, whatever it came from."""
    config = _config(name)
    found = open_checkpoint(_saved(tmp_path, config)).config
    expected, actual = (rope_attention_factor(each.rope("full")) for each in (config, found))
    assert actual == pytest.approx(expected, rel=2e-7)
    assert found.rope_scaling is not None
    plain = {"attention_factor": None, "mscale": None, "mscale_all_dim": None}
    if config.rope_scaling == dataclasses.replace(config.rope_scaling, **plain):
        assert found == config
    else:
        assert dataclasses.replace(found.rope_scaling, **plain) == dataclasses.replace(config.rope_scaling, **plain)


def test_scalings_that_no_key_says(tmp_path: Path) -> None:
    for scaling, what in (
        (RopeScaling(kind="dynamic", factor=2.0), "dynamic NTK"),
        (dataclasses.replace(YARN, truncate=False), "YaRN without truncation"),
    ):
        with pytest.raises(LlamaJaxError, match=f"rope_scaling is {what}, for which GGUF has no key"):
            _saved(tmp_path, dataclasses.replace(CONFIG, rope_scaling=scaling))
    assert list(tmp_path.iterdir()) == []


_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"
_BOTH = {_SHORT: np.asarray(SHORT, np.float32), _LONG: np.asarray(LONG, np.float32)}
_YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": np.float32(8)}
_ORIGINAL = {"llama.rope.scaling.original_context_length": np.uint32(256)}


@pytest.mark.parametrize(
    ("keys", "tensors", "scaling"),
    [
        (_YARN, {}, dataclasses.replace(YARN, original_context_length=2048)),
        (_YARN | _ORIGINAL | {"llama.rope.scaling.yarn_attn_factor": np.float32(1.2)}, {}, YARN),
        # Ministral's two logarithms cancel.
        (_YARN | _ORIGINAL | {"llama.rope.scaling.yarn_log_multiplier": np.float32(1)}, {}, 1.0),
        (_YARN | _ORIGINAL | {"llama.rope.scaling.attn_factor": np.float32(1.5)}, {}, 1.5 * (0.1 * np.log(8) + 1)),
        (_ORIGINAL | {"llama.rope.scaling.attn_factor": np.float32(1.25)}, _BOTH, 1.25),
        # Phi-3's converter writes no type; where there is none, llama.cpp multiplies by no factor.
        (_ORIGINAL, _BOTH, 1.0),
    ],
)
def test_keys_as_they_are_found(keys: dict[str, Any], tensors: dict[str, Any], scaling: Any, tmp_path: Path) -> None:
    made = write(tmp_path / "m.gguf", config=CONFIG, metadata=keys, extra=tensors)
    found = open_checkpoint(made.path).config
    if isinstance(scaling, RopeScaling):
        assert found.rope_scaling == scaling
        return
    assert found.rope_scaling is not None and found.rope_scaling.kind == ("longrope" if tensors else "yarn")
    assert rope_attention_factor(Rope(theta=1e4, scaling=found.rope_scaling)) == pytest.approx(scaling, rel=1e-6)


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        (_YARN | {"llama.rope.scaling.yarn_ext_factor": np.float32(0.5)}, {}, "yarn_ext_factor is 0.5, which is not"),
        (
            _YARN | {"llama.rope.scaling.yarn_beta_slow": np.float32(64)},
            {},
            "beta_fast is 32.0: expected .* at least 64",
        ),
        (
            _YARN | {"llama.rope.scaling.yarn_log_multiplier": np.float32(-1)},
            {},
            "yarn_log_multiplier is -1.0: expected",
        ),
        (
            _YARN | {"llama.rope.scaling.attn_factor": np.float32("nan")},
            {},
            "attn_factor is nan: expected a finite",
        ),
        (_YARN | {"llama.rope.scaling.factor": np.float32("inf")}, {}, "scaling.factor is inf: expected a finite"),
        (_YARN, _BOTH, "rope_factors_short.weight and another RoPE scaling"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "tensor 'rope_factors_short.weight' is missing: longrope needs"),
        ({}, {_SHORT: _BOTH[_SHORT]}, "tensor 'rope_factors_long.weight' is missing"),
        ({}, _BOTH | {_LONG: np.ones(4, np.float32)}, r"rope_factors_long.weight has shape \(4,\): expected \(16,\)"),
        ({}, _BOTH | {_LONG: np.zeros(16, np.float32)}, "rope_factors_long.weight holds .*: expected finite numbers"),
        ({"llama.rope.scaling.factor": np.float32(2)}, _BOTH, "rope.scaling.factor is 2.0, which is not supported"),
        (
            _ORIGINAL | {"llama.rope.scaling.original_context_length": np.uint32(0)},
            _BOTH,
            "context_length is 0: expected",
        ),
        (
            {"llama.rope.scaling.attn_factor": np.float32(1.5)},
            {},
            "rope.scaling.attn_factor is 1.5, which is not support",
        ),
    ],
)
def test_refused_keys_and_tensors(keys: dict[str, Any], tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = write(tmp_path / "m.gguf", config=CONFIG, metadata=keys, extra=tensors)
    with pytest.raises(LlamaJaxError, match=f"^{made.path}.*{message}"):
        open_checkpoint(made.path)


@pytest.mark.extras
@pytest.mark.parametrize("name", SCALINGS)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    """In one piece, within the original context and beyond."""
    pytest.importorskip("xllamacpp", reason="compares with llama.cpp: install the extra: pip install -e '.[parity]'")
    from tests import llamacpp

    config = _config(name)
    path = _saved(tmp_path, config)
    model = random_model(config)
    tokens = np.random.default_rng(7).integers(0, 512, 512)
    with llamacpp.Model(path) as theirs:
        for count in (256, 512):
            expected = theirs.logits(tokens[:count].tolist())
            np.testing.assert_allclose(forward(model, tokens[None, :count])[0], expected, atol=1e-3)
