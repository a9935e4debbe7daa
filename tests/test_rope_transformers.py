"""RoPE against Hugging Face transformers: frequencies, rotary modules of families, and config.json both ways."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from llamajax import Config
from llamajax.families import config_from_hf, config_to_hf
from llamajax.rope import rope_attention_factor, rope_frequencies

_REASON = "compares with Hugging Face transformers: install the extra: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=_REASON)
transformers = pytest.importorskip("transformers", reason=_REASON)
pytestmark = pytest.mark.extras

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 16}
# Published scalings: Llama 3.1, Qwen2.5's model card, gpt-oss, OLMo 3, DeepSeek V2 and V3, Ministral 3, Gemma 3; and
# one of Phi's kind.
LINEAR = {"rope_type": "linear", "factor": 8.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1 + i / 16 for i in range(8)],
    "long_factor": [1 + 1.5 * i for i in range(8)],
    "original_max_position_embeddings": 128,
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "dynamic": DYNAMIC,
    "llama3": LLAMA3,
    "yarn": YARN,
    "gpt-oss": YARN | {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    "olmo3": YARN | {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0},
    "deepseek": YARN | {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707},
    "mscales": YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16.0},
    "no factor": YARN | {"factor": None},
    "longrope": LONGROPE,
    "longrope, its own factors": LONGROPE | {"factor": 32.0, "attention_factor": 1.3},
}
_CLASSES = {"llama": "LlamaConfig", "phi3": "Phi3Config", "gemma3_text": "Gemma3TextConfig", "olmo3": "Olmo3Config"}


def _theirs(kind: str = "llama", **fields: Any) -> Any:
    """Makes a config of transformers as if it were loaded from config.json."""
    return getattr(transformers, _CLASSES[kind]).from_dict(json.loads(json.dumps(SIZES | fields)))


def _ours(theirs: Any, kind: str = "llama") -> Config:
    """Returns what we read from the config.json that transformers writes."""
    return config_from_hf(json.loads(theirs.to_json_string(use_diff=False)) | {"model_type": kind})


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_and_factors(name: str, theta: float) -> None:
    for spelling in (
        {"rope_parameters": ROPES[name] | {"rope_theta": theta}},
        {"rope_scaling": ROPES[name], "rope_theta": theta},
    ):
        theirs = _theirs(**spelling)
        rope = config_from_hf({"model_type": "llama"} | SIZES | spelling).rope("full")
        assert _ours(theirs).rope("full") == rope
        for reach in (1, 128, 129, 512, 513, 5000):
            expected, factor = ROPE_INIT_FUNCTIONS[ROPES[name]["rope_type"]](theirs, seq_len=reach)
            np.testing.assert_allclose(rope_frequencies(rope, 16, reach), expected.numpy(), rtol=1e-6)
            assert rope_attention_factor(rope) == pytest.approx(factor, rel=1e-9)


def test_frequencies_of_published_sizes() -> None:
    """Frequencies agree for whole heads of 64, 128 and 256, and for a part of a head: Phi-4 mini's 96 of 128.

    transformers computes in float32, which is off by 2e-6 where it subtracts numbers of turns.
    """
    for size, fraction, theta in ((64, 1.0, 150000.0), (128, 1.0, 5e5), (256, 1.0, 1e6), (128, 0.75, 1e4)):
        for name in ("linear", "dynamic", "llama3", "gpt-oss", "deepseek"):
            rope = ROPES[name] | {"rope_theta": theta, "partial_rotary_factor": fraction}
            fields = {"head_dim": size, "max_position_embeddings": 131072, "rope_parameters": rope}
            if "original_max_position_embeddings" in rope:
                rope["original_max_position_embeddings"] = 8192
            theirs = _theirs(**fields)
            ours = _ours(_theirs(**fields | {"rope_parameters": rope | {"partial_rotary_factor": 1.0}})).rope("full")
            expected, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, seq_len=200000)
            actual = rope_frequencies(ours, int(size * fraction), 200000)
            np.testing.assert_allclose(actual, expected.numpy(), rtol=3e-6)


# ---- Rotary modules -------------------------------------------------------------------------------------------------

_NESTED = {"full_attention": YARN | {"rope_theta": 2e5}, "sliding_attention": {"rope_type": "default"}}
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
# A family, fields of its config.json, and the kinds of layer that have a RoPE.
MODULES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    **{name: ("llama", {"rope_parameters": rope | {"rope_theta": 1e4}}, ("full",)) for name, rope in ROPES.items()},
    "phi": (
        "phi3",
        {"rope_scaling": {key: LONGROPE[key] for key in ("short_factor", "long_factor")} | {"type": "longrope"}}
        | {"original_max_position_embeddings": 128, "partial_rotary_factor": 1.0},
        ("full",),
    ),
    "phi, a part of a head": (
        "phi3",
        {"rope_theta": 2e4, "partial_rotary_factor": 0.75},
        ("full",),
    ),
    "gemma": ("gemma3_text", _LAYERS | {"rope_scaling": LINEAR, "rope_theta": 5e5}, ("window", "full")),
    "gemma, local theta": ("gemma3_text", _LAYERS | {"rope_local_base_freq": 5e3}, ("window", "full")),
    "gemma, by layer": ("gemma3_text", _LAYERS | {"rope_parameters": _NESTED}, ("window", "full")),
    "gemma, null": ("gemma3_text", _LAYERS | {"rope_parameters": None, "rope_scaling": None}, ("window", "full")),
    "olmo": ("olmo3", _LAYERS | {"rope_scaling": YARN, "rope_theta": 5e5}, ("window", "full")),
    "olmo, by layer": ("olmo3", _LAYERS | {"rope_parameters": _NESTED}, ("window", "full")),
}
_ROTARY = {
    "llama": transformers.models.llama.modeling_llama.LlamaRotaryEmbedding,
    "phi3": transformers.models.phi3.modeling_phi3.Phi3RotaryEmbedding,
    "gemma3_text": transformers.models.gemma3.modeling_gemma3.Gemma3RotaryEmbedding,
    "olmo3": transformers.models.olmo3.modeling_olmo3.Olmo3RotaryEmbedding,
}
_THEIR_KINDS = {"window": "sliding_attention", "full": "full_attention"}


@pytest.mark.parametrize("name", MODULES)
def test_rotary_modules(name: str) -> None:
    """Cosines and sines agree within the original context and far beyond it, for configs as read and as written."""
    kind, fields, kinds = MODULES[name]
    ours = config_from_hf(SIZES | fields | {"model_type": kind})
    assert _ours(_theirs(kind, **fields), kind) == ours
    for theirs in (_theirs(kind, **fields), _theirs(kind, **config_to_hf(ours))):
        for count in (100, 128, 129, 3000):
            for layer in kinds:
                module = _ROTARY[kind](theirs)
                options = {} if kind in ("llama", "phi3") else {"layer_type": _THEIR_KINDS[layer]}
                positions = torch.arange(count)[None]
                cos, sin = module(torch.zeros(1), positions, **options)
                rope = ours.rope(layer)
                angle = np.arange(count)[:, None] * np.asarray(rope_frequencies(rope, ours.rotated_size, count), float)
                factor, half = rope_attention_factor(rope), ours.rotated_size // 2
                for actual, expected in ((np.cos(angle), cos), (np.sin(angle), sin)):
                    np.testing.assert_allclose(actual * factor, expected[0, :, :half].numpy(), atol=2e-3)


# ---- Models ---------------------------------------------------------------------------------------------------------

_logits = jax.jit(lambda model, tokens: model(tokens)[0], compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("name", ["dynamic", "gpt-oss", "mscales", "longrope"])
def test_logits_on_both_sides_of_the_original_context(name: str, tmp_path: Any) -> None:
    import llamajax

    theirs = _theirs(rope_parameters=ROPES[name] | {"rope_theta": 1e4}, max_position_embeddings=256)
    theirs.initializer_range = 0.2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(theirs).eval()
    model.save_pretrained(tmp_path)
    ours, _ = llamajax.load(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 64, (1, 400))
    for count in (96, 400):
        with torch.no_grad():
            expected = model(torch.tensor(tokens[:, :count])).logits.numpy()
        np.testing.assert_allclose(_logits(ours, tokens[:, :count]), expected, atol=1e-4 * abs(expected).max())
