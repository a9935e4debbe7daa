"""Every family against Hugging Face transformers: tiny random models, saved by one and read by the other."""

import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
from llamajax import Llama
from llamajax.caches import KVCache
from llamajax.families import pieces
from llamajax.parameters import specs, weights_of
from llamajax.quantization.quantize import quantize
from quant import values

_REASON = "compares with Hugging Face transformers: install the extra: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=_REASON)
transformers = pytest.importorskip("transformers", reason=_REASON)
pytestmark = pytest.mark.extras


class Case(NamedTuple):
    """A model of a family.

    Attributes:
        kind: its `model_type`.
        fields: of its config, beside the sizes.
        family: ours.
    """

    kind: str
    fields: Mapping[str, Any]
    family: str = ""


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
THETA = {"rope_type": "default", "rope_theta": 1e4}
# Windows and original contexts are shorter than the 48 tokens that are compared.
CASES = {
    "llama-biases": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "iquestcoder": Case("iquestcoder", {"head_dim": 16}, "llama"),
    "internlm3": Case("internlm3", {"head_dim": 16}, "llama"),
    "seed_oss": Case("seed_oss", {"head_dim": 16}),
    "seed_oss-out": Case("seed_oss", {"head_dim": 16, "attention_out_bias": True, "attention_bias": False}),
    "mistral": Case("mistral", {"sliding_window": 7}),
    "mistral-full": Case("mistral", {"sliding_window": None, "head_dim": 16}),
    "ministral": Case("ministral", {"sliding_window": 7}),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": Case("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}),
    "qwen3": Case("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-bias": Case("qwen3", {"head_dim": 16, "attention_bias": True}),
    "gemma": Case("gemma", {"head_dim": 16}),
    "gemma2": Case("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 9}),
    "gemma2-uncapped": Case(
        "gemma2", {"head_dim": 8, "sliding_window": 9, "attn_logit_softcapping": None, "final_logit_softcapping": 3.0}
    ),
    "smollm3": Case("smollm3", {}),
    "smollm3-list": Case("smollm3", {"no_rope_layers": [0, 1, 1, 0], "attention_bias": True}),
    "olmo2": Case("olmo2", {}),
    "granite": Case(
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.2,
            "logits_scaling": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": Case("phi3", {"sliding_window": 9, "rope_parameters": THETA | {"partial_rotary_factor": 1.0}}),
}
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 48))
CHUNK = 8
STEPS = 64
_COMPILER = {"xla_backend_optimization_level": 0}


def _theirs(case: Case) -> "transformers.PreTrainedModel":
    """A random model of transformers' own making: large weights, so that attention is not uniform."""
    fields = {**SIZES, "rope_parameters": dict(THETA)} | case.fields
    config = transformers.AutoConfig.for_model(case.kind, **json.loads(json.dumps(fields)))
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms, which begin at 1 or at 0, and biases
                with torch.no_grad():
                    parameter += torch.empty_like(parameter).uniform_(-0.5, 0.5)
    return model.eval()


@functools.partial(jax.jit, compiler_options=_COMPILER)
def _whole(model: Llama) -> jax.Array:
    return model(TOKENS)[0]


@functools.partial(jax.jit, compiler_options=_COMPILER)
def _step(model: Llama, tokens_BT: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    return model(tokens_BT, cache)


def _in_pieces(model: Llama, length: int, steps: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of TOKENS, given `length` at a time, and the greedy tokens behind them."""
    cache = KVCache.empty(model.config, 2, TOKENS.shape[1] + STEPS, jnp.float32)
    found = []
    for first in range(0, TOKENS.shape[1], length):
        logits_BTV, cache = _step(model, jnp.asarray(TOKENS[:, first : first + length]), cache)
        found.append(logits_BTV)
    chosen = []
    for _ in range(steps):
        chosen.append(jnp.argmax(logits_BTV[:, -1:], axis=-1))
        logits_BTV, cache = _step(model, chosen[-1], cache)
    return np.concatenate(found, axis=1), np.concatenate(chosen, axis=1) if chosen else np.empty(0)


def _their_logits(model: Any, tokens: np.ndarray = TOKENS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens), use_cache=False).logits.float().numpy()


def _assert_logits(actual: Any, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    assert np.std(expected) > 0.3, "logits too small for the tolerance to mean anything"
    assert np.max(np.abs(np.asarray(actual) - expected)) <= tolerance


@pytest.mark.parametrize("name", CASES)
def test_family(name: str, tmp_path: Any) -> None:
    """Their model read by us, in one piece, in chunks, token by token, in int4; and written by us, read by them."""
    case = CASES[name]
    theirs = _theirs(case)
    theirs.save_pretrained(tmp_path / "theirs")
    model, _ = llamajax.load(tmp_path / "theirs")
    assert model.config.family == (case.family or case.kind)
    expected = _their_logits(theirs)
    _assert_logits(_whole(model), expected)
    _assert_logits(_in_pieces(model, CHUNK)[0], expected)
    single, chosen = _in_pieces(model, 1, STEPS)
    _assert_logits(single, expected)
    continued = np.concatenate([TOKENS, chosen], axis=1)
    # One pass of theirs over all of it chooses the same 64 tokens, each for what came before.
    np.testing.assert_array_equal(_their_logits(theirs, continued)[:, -STEPS - 1 : -1].argmax(axis=-1), chosen)
    _check_int4(model, theirs)
    llamajax.save_checkpoint(model, tmp_path / "ours", form="huggingface")
    again, report = type(theirs).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), f"missing, unexpected or mismatched: {report}"
    np.testing.assert_array_equal(
        _their_logits(again), _their_logits(type(theirs).from_pretrained(tmp_path / "theirs"))
    )


def _check_int4(model: Llama, theirs: Any) -> None:
    """The packed model against theirs with the weights that the packed ones stand for."""
    packed = quantize(model, "int4-g32")
    given = _dequantized(packed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.tensor(given[name]))
    _assert_logits(_whole(packed), _their_logits(theirs))


def _dequantized(model: Llama) -> dict[str, np.ndarray]:
    """The weights by transformers' names, in its orientation."""
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for place, weight in weights_of(model).items():
        piece, array = pieces(model.config, "huggingface")[place], np.asarray(values(weight), np.float32)
        array = array.T if specs(model.config)[place].transposed else array
        found.setdefault(piece.tensor, []).append((piece.rows.start if piece.rows else 0, array))
    return {
        name: np.concatenate([array for _, array in sorted(parts, key=lambda one: one[0])])
        for name, parts in found.items()
    }
