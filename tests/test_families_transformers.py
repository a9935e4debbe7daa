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
from llamajax.parameters import named_weights, specs, weights_of
from llamajax.quantization.quantize import quantize
from quant import values
from quant.recipe import Rule

_REASON = "compares with Hugging Face transformers: install the extra: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=_REASON)
transformers = pytest.importorskip("transformers", reason=_REASON)
pytestmark = pytest.mark.extras


class Case(NamedTuple):
    """A model of a family.

    Attributes:
        kind: its `model_type`.
        fields: fields of its config, beside the sizes.
    """

    kind: str
    fields: Mapping[str, Any]


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
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 5.0],
    "original_max_position_embeddings": 16,
}
# Windows and original contexts are shorter than the 48 tokens that are compared.
CASES = {
    "llama-biases": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "iquestcoder": Case("iquestcoder", {"head_dim": 16}),
    "internlm3": Case(
        "internlm3",
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
            "max_position_embeddings": 32,
        },
    ),
    "seed_oss": Case("seed_oss", {"head_dim": 16}),
    "seed_oss-out": Case("seed_oss", {"head_dim": 16, "attention_out_bias": True, "attention_bias": False}),
    "mistral": Case("mistral", {"sliding_window": 7}),
    "mistral-full": Case("mistral", {"sliding_window": None, "head_dim": 16}),
    "ministral": Case("ministral", {"sliding_window": 7, "head_dim": 8}),
    "ministral-types": Case(
        "ministral",
        {"sliding_window": 7, "head_dim": 8, "layer_types": ["full_attention"] + ["sliding_attention"] * 3},
    ),
    "ministral3": Case(
        "ministral3",
        {
            "head_dim": 16,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
        },
    ),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": Case("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}),
    "qwen2-yarn": Case("qwen2", {"rope_parameters": YARN}),
    "qwen3": Case("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-bias": Case("qwen3", {"head_dim": 16, "attention_bias": True}),
    "gemma": Case("gemma", {"head_dim": 16}),
    "gemma2": Case("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 9}),
    "gemma2-uncapped": Case(
        "gemma2", {"head_dim": 8, "sliding_window": 9, "attn_logit_softcapping": None, "final_logit_softcapping": 3.0}
    ),
    "gemma3": Case(
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 9,
            "sliding_window_pattern": 3,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": THETA},
        },
    ),
    "smollm3": Case("smollm3", {}),
    "smollm3-list": Case("smollm3", {"no_rope_layers": [0, 1, 1, 0], "attention_bias": True}),
    "olmo2": Case("olmo2", {}),
    "olmo3": Case(
        "olmo3", {"sliding_window": 9, "rope_parameters": {"full_attention": YARN, "sliding_attention": THETA}}
    ),
    "exaone4": Case("exaone4", {"sliding_window": 9}),
    "exaone4-full": Case("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
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
    "phi3": Case("phi3", {"sliding_window": 9}),
    "phi3-long": Case("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16}),
    "phi3-short": Case("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "phi4-mini": Case(
        "phi3",
        {
            "hidden_size": 64,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 16,
            "rope_parameters": LONG | {"partial_rotary_factor": 0.5},
        },
    ),
}
# Our library has another name for it.
FAMILY_OF = {"gemma3_text": "gemma3", "iquestcoder": "llama", "internlm3": "llama"}
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 48))
CHUNK = 8
torch.set_num_threads(1)  # such models are too small to share among them
STEPS = 64
_COMPILER = {"xla_backend_optimization_level": 0}


def _theirs(case: Case) -> "transformers.PreTrainedModel":
    """A random model made by transformers, with no weight at its initial value, and large ones for uneven attention."""
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
    """Returns logits of TOKENS, fed `length` at a time, and the greedy tokens that follow."""
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
    """We read their model (in one piece, in chunks, token by token, in int4), and they read the one that we write."""
    case = CASES[name]
    made = _theirs(case)
    made.save_pretrained(tmp_path / "theirs")
    load = functools.partial(type(made).from_pretrained, attn_implementation="eager")
    theirs = load(tmp_path / "theirs")
    model, _ = llamajax.load(tmp_path / "theirs")
    assert model.config.family == FAMILY_OF.get(case.kind, case.kind)
    expected = _their_logits(theirs)
    _assert_logits(_whole(model), expected)
    llamajax.save_checkpoint(model, tmp_path / "ours", form="huggingface")
    again, report = load(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), f"missing, unexpected or mismatched: {report}"
    np.testing.assert_array_equal(_their_logits(again), expected)
    _check_pieces(model, theirs)
    _check_int4(model, load(tmp_path / "theirs"))


def _check_pieces(model: Llama, theirs: Any) -> None:
    """Compares chunks and single tokens with one pass of theirs over as many tokens as the cache has slots."""
    single, chosen = _in_pieces(model, 1, STEPS)
    expected = _their_logits(theirs, np.concatenate([TOKENS, chosen], axis=1))
    _assert_logits(single, expected[:, : TOKENS.shape[1]])
    _assert_logits(_in_pieces(model, CHUNK)[0], expected[:, : TOKENS.shape[1]])
    # Given the same text, theirs chooses the same tokens.
    np.testing.assert_array_equal(expected[:, -STEPS - 1 : -1].argmax(axis=-1), chosen)


def _check_int4(model: Llama, theirs: Any) -> None:
    """Compares the packed model with theirs on the dequantized weights."""
    keep = [Rule(weights="*norm*", keep=True), Rule(weights="*_bias_*", keep=True)]
    biases = any("_bias_" in name for name in named_weights(model))
    packed = quantize(model, (*keep[: 1 + biases], Rule(weights="*", scheme="int4", group_size=32)))
    given = _dequantized(packed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.tensor(given[name]))
    _assert_logits(_whole(packed), _their_logits(theirs))


def _dequantized(model: Llama) -> dict[str, np.ndarray]:
    """Returns dequantized weights by transformers' names, in its orientation."""
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for place, weight in weights_of(model).items():
        piece, array = pieces(model.config, "huggingface")[place], np.asarray(values(weight), np.float32)
        array = array.T if specs(model.config)[place].transposed else array
        found.setdefault(piece.tensor, []).append((piece.rows.start if piece.rows else 0, array))
    ordered = {name: sorted(parts, key=lambda one: one[0]) for name, parts in found.items()}
    return {name: np.concatenate([array for _, array in parts]) for name, parts in ordered.items()}


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.mark.parametrize(
    ("kind", "text", "fields"),
    [
        ("gemma3", {"model_type": "gemma3_text", "sliding_window": 9}, {"mm_tokens_per_image": 4}),
        (
            "mistral3",
            {"model_type": "ministral3"},
            {"vision_config": VISION | {"model_type": "pixtral", "head_dim": 8}},
        ),
    ],
)
def test_text_of_a_model_that_sees_images(kind: str, text: dict, fields: dict, tmp_path: Any) -> None:
    text = {**SIZES, "head_dim": 16, "pad_token_id": 0} | text
    config = transformers.AutoConfig.for_model(
        kind, **{"vision_config": VISION, "image_token_index": 63} | fields, text_config=text
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = transformers.AutoModelForImageTextToText.from_config(config).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter += torch.empty_like(parameter).uniform_(-0.3, 0.3)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="tensors are for images only, not read"):
        model, _ = llamajax.load(tmp_path)
    tokens = TOKENS % 60 + 3  # no token of images
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    _assert_logits(model(tokens)[0], expected)
