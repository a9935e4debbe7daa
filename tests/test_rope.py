"""RoPE of every kind: frequencies against the float64 reference, its fields in config.json, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from export.bundle import write
from export.profiles import Spec
from export.programs import functions
from llamajax import Config, Engine, Kept, KVCache, Llama, LlamaJaxError, RopeScaling, stream
from llamajax.families import config_from_hf, config_to_hf
from llamajax.families.family import FAMILIES, Family, Format, Keys
from llamajax.families.huggingface_rope import read_rope, rope_value, write_rope
from llamajax.rope import Rope, rope_attention_factor, rope_frequencies
from tests import reference
from tests.isolated import run_isolated
from tests.programs import forward, step

SHORT = tuple(1 + 0.05 * i for i in range(8))
LONG = tuple(1 + 1.7 * i for i in range(8))
YARN = RopeScaling(kind="yarn", factor=4.0, original_context_length=512)
LONGROPE = RopeScaling(kind="longrope", factor=32.0, original_context_length=64, short_factors=SHORT, long_factors=LONG)
DYNAMIC = RopeScaling(kind="dynamic", factor=2.0, original_context_length=64)
SCALINGS = {
    "none": None,
    "linear": RopeScaling(kind="linear", factor=4.0),
    "dynamic": DYNAMIC,
    "llama3": RopeScaling(kind="llama3", factor=8.0, original_context_length=128),
    "yarn": YARN,
    # gpt-oss: the ramp's ends are fractions, not whole numbers of pairs.
    "yarn, not truncated": dataclasses.replace(YARN, factor=32.0, truncate=False),
    "yarn, steep": dataclasses.replace(YARN, beta_fast=4.0, beta_slow=2.0, attention_factor=1.3),
    "yarn, DeepSeek's": dataclasses.replace(YARN, factor=40.0, mscale=0.707, mscale_all_dim=0.5),
    "yarn, one mscale": dataclasses.replace(YARN, factor=40.0, mscale=0.707),
    "longrope": LONGROPE,
    "longrope, its own factor": dataclasses.replace(LONGROPE, attention_factor=1.1),
}
SIZES = dict(
    vocab_size=32, width=32, ffn_width=12, num_layers=2, num_heads=2, num_kv_heads=1, head_size=16, context_length=2048
)


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_factors(name: str) -> None:
    """Requests lie within the original context, at its end, one token beyond it, and far beyond it."""
    for theta in (1e4, 5e5):
        config = Config(**SIZES, rope_theta=theta, rope_scaling=SCALINGS[name])
        rope = Rope(theta=theta, scaling=SCALINGS[name])
        assert rope_attention_factor(rope) == pytest.approx(reference.rope_factor(config), rel=1e-12)
        for reach in (1, 64, 65, 4096):
            expected = reference.frequencies(config, reach)
            np.testing.assert_allclose(rope_frequencies(rope, 16, reach), expected, rtol=1e-6)
        np.testing.assert_array_equal(rope_frequencies(rope, 16), rope_frequencies(rope, 16, 1))


def test_only_dynamic_and_longrope_choose_by_reach() -> None:
    for name, scaling in SCALINGS.items():
        rope = Rope(theta=1e4, scaling=scaling)
        chosen = [rope.choice(reach) for reach in (None, 1, 64, 65, 66)]
        assert chosen[0] == chosen[1] == chosen[2], name
        different = len({np.asarray(rope_frequencies(rope, 16, reach)).tobytes() for reach in (64, 65, 66)})
        assert len(set(chosen[2:])) == different, name
    assert (Rope(theta=1e4, scaling=DYNAMIC).choice(65), Rope(theta=1e4, scaling=LONGROPE).choice(65)) == (65, True)


# ---- Manifests ------------------------------------------------------------------------------------------------------


def test_manifests() -> None:
    for scaling in SCALINGS.values():
        config = Config(**SIZES, rope_scaling=scaling)
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert SCALINGS["linear"].to_dict() == {"kind": "linear", "factor": 4.0}  # type: ignore[union-attr]


def test_manifests_of_earlier_releases() -> None:
    """Earlier manifests store llama3's values for every kind of scaling."""
    values = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 8192}
    assert RopeScaling.from_dict({"kind": "linear"} | values) == RopeScaling(kind="linear", factor=4.0)
    assert RopeScaling.from_dict({"kind": "llama3"} | values) == RopeScaling(kind="llama3", factor=4.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "yarn", "factor": 2.0}, "missing key 'original_context_length': rope scaling 'yarn' needs it"),
        (
            {"kind": "linear", "factor": 2.0, "beta_fast": 8.0},
            "beta_fast is 8.0: expected only fields of rope scaling 'linear'",
        ),
        (
            YARN.to_dict() | {"short_factors": [1.0]},
            r"short_factors is .*: expected only fields of rope scaling 'yarn', which has",
        ),
        (YARN.to_dict() | {"beta_slow": 0}, "beta_slow is 0: expected a finite number, above 0.0"),
        (YARN.to_dict() | {"beta_fast": 0.5}, "beta_fast is 0.5: expected a finite number, at least 1.0"),
        (YARN.to_dict() | {"truncate": 1}, "truncate is 1: expected true or false"),
        (YARN.to_dict() | {"attention_factor": 0}, "attention_factor is 0: expected a finite number, above 0.0"),
        (YARN.to_dict() | {"mscale": "1"}, "mscale is '1': expected a finite number"),
        (LONGROPE.to_dict() | {"long_factors": []}, r"long_factors is \(\): expected numbers, one for each pair"),
        (LONGROPE.to_dict() | {"long_factors": 3}, "long_factors is 3: expected numbers, one for each pair"),
        (LONGROPE.to_dict() | {"long_factors": [1.0] * 7 + [0]}, "long_factors is 0: expected a finite number, above"),
        (LONGROPE.to_dict() | {"short_factors": [1.0] * 7}, "short_factors holds 7 numbers: expected 8, one for each"),
        (
            LONGROPE.to_dict() | {"original_context_length": 1},
            "original_context_length is 1: expected more, as longrope",
        ),
        (DYNAMIC.to_dict() | {"original_context_length": 0}, "original_context_length is 0: expected a whole number"),
    ],
)
def test_refused_scalings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LlamaJaxError, match=message):
        Config.from_dict(SIZES | {"rope_scaling": change})


def test_refused_beside_a_config() -> None:
    with pytest.raises(LlamaJaxError, match="rope scaling 'dynamic' has 2 rotated coordinates: expected at least"):
        Config(**SIZES | {"head_size": 2}, rope_scaling=DYNAMIC)
    with pytest.raises(LlamaJaxError, match="rope_theta is 1: expected more, as rope scaling 'yarn'"):
        Config(**SIZES, rope_theta=1, rope_scaling=YARN)
    with pytest.raises(LlamaJaxError, match="short_factors holds 8 numbers: expected 6, one for each pair"):
        Config(**SIZES, rope_fraction=0.75, rope_scaling=LONGROPE)


def test_numbers_of_any_size_overflow_quietly() -> None:
    """Absurd scalings give frequencies of 0 without a warning (warnings are errors in tests)."""
    for kind in ("linear", "dynamic", "yarn", "llama3"):
        scaling = RopeScaling(kind=kind, factor=1e308)
        assert np.isfinite(rope_frequencies(Rope(theta=1e308, scaling=scaling), 16, 1 << 27)).all()
    for turns in ({"beta_fast": 1e308}, {"beta_slow": 5e-324}):
        rope = Rope(theta=math.nextafter(1, 2), scaling=dataclasses.replace(YARN, **turns))
        assert np.isfinite(rope_frequencies(rope, 16)).all()


# ---- config.json ----------------------------------------------------------------------------------------------------

HF = dict(
    model_type="llama", vocab_size=32, hidden_size=32, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
)
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
_LONG = {"type": "longrope", "short_factor": list(SHORT), "long_factor": list(LONG)}
_LONG_64 = _LONG | {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}, DYNAMIC),
        ({"rope_scaling": _YARN}, YARN),
        # Null counts as missing; a missing factor is the ratio of the context lengths (DeepSeek V3).
        ({"rope_scaling": _YARN | {"factor": None, "beta_fast": None}, "max_position_embeddings": 2048}, YARN),
        ({"rope_scaling": _YARN | {"finetuned": True}}, YARN),
        ({"rope_parameters": _YARN | {"rope_theta": 1e4, "type": "yarn"}}, YARN),
        ({"rope_parameters": _YARN, "original_max_position_embeddings": 128}, 128),
        (
            {"rope_scaling": _YARN | {"truncate": False, "mscale": 0.707, "mscale_all_dim": 0.5, "beta_slow": 2}},
            dataclasses.replace(YARN, truncate=False, mscale=0.707, mscale_all_dim=0.5, beta_slow=2),
        ),
        ({"rope_scaling": _LONG, "original_max_position_embeddings": 64}, LONGROPE),
        ({"rope_scaling": _LONG | {"type": "su"}, "original_max_position_embeddings": 64}, LONGROPE),
        ({"rope_scaling": _LONG_64 | {"type": "yarn", "rope_type": "longrope"}}, LONGROPE),
        ({"rope_parameters": _LONG_64 | {"factor": 32.0}}, LONGROPE),
        ({"rope_parameters": _LONG_64 | {"factor": 8.0}}, dataclasses.replace(LONGROPE, factor=8.0)),
        ({"rope_parameters": _LONG | {"attention_factor": 1.5}}, None),
    ],
)
def test_scalings_of_config_json(fields: dict[str, Any], scaling: Any) -> None:
    config = config_from_hf(HF | {"max_position_embeddings": 2048} | fields)
    if isinstance(scaling, int):
        scaling = dataclasses.replace(YARN, original_context_length=scaling)
    if scaling is None:  # no original context is given: it is the model's context
        scaling = dataclasses.replace(LONGROPE, factor=1.0, original_context_length=2048, attention_factor=1.5)
    assert config.rope_scaling == scaling
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_the_spelling_that_transformers_4_reads() -> None:
    """The Phi-3 of transformers 4 refuses a scaling of more than three keys."""
    written = config_to_hf(Config(**SIZES, rope_scaling=LONGROPE))
    assert written["rope_scaling"] == _LONG and written["original_max_position_embeddings"] == 64
    written = config_to_hf(Config(**SIZES, rope_scaling=YARN))
    assert written["rope_scaling"] == _YARN | {"beta_fast": 32.0, "beta_slow": 1.0}
    assert "rope_parameters" not in written


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "mrope", "mrope_section": [8, 8]},
            "rope_type is 'mrope', which is not supported: expected one of",
        ),
        ({"rope_type": "default", "mrope_section": [8, 8]}, "'mrope_section' is not supported for rope_type 'default'"),
        ({"rope_type": "proportional", "factor": 2.0}, "rope_type is 'proportional', which is not supported"),
        (_YARN | {"attn_factor": 1.0}, "'attn_factor' is not supported for rope_type 'yarn': expected factor"),
        (
            _YARN | {"original_max_position_embeddings": "4k", "factor": None},
            "original_max_position_embeddings is '4k'",
        ),
        (_YARN | {"factor": "4"}, "rope scaling factor is '4': expected a finite number"),
        ({"type": "longrope", "short_factor": [1.0]}, "missing key 'long_factor': rope_type 'longrope' needs"),
        (_LONG | {"long_factor": list(LONG[:7])}, "long_factors holds 7 numbers: expected 8"),
        (_LONG | {"short_mscale": 1.2}, "'short_mscale' is not supported for rope_type 'longrope'"),
    ],
)
def test_refused_ropes_of_config_json(rope: dict[str, Any], message: str) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.raises(LlamaJaxError, match=f"^x: .*{message}"):
            config_from_hf(HF | {"max_position_embeddings": 2048, key: rope}, "x")


# ---- Layers with windows, and parts of heads ------------------------------------------------------------------------

_GEMMA = Format(("gemma",), defaults={"rope_theta": 1e6, "rope_local_base_freq": 1e4}, window_rope=True)
_OLMO = Format(("olmo",), defaults={"rope_theta": 5e5}, window_rope=True)
_PHI = Format(("phi",), partial_rope=True)
_KINDS = ("window", "full")
_LINEAR = {"rope_type": "linear", "factor": 8.0}
_OURS = {"kind": "linear", "factor": 8.0}


def _read(fields: dict[str, Any], form: Format, kinds: tuple[str, ...] = _KINDS) -> dict[str, Any]:
    return read_rope(Keys(fields, "x", form.defaults), 2048, form, kinds)


def _nested(full: Any, window: Any) -> dict[str, Any]:
    return {"rope_parameters": {"full_attention": full, "sliding_attention": window}}


@pytest.mark.parametrize(
    ("form", "fields", "theta", "scaling", "window"),
    [
        (_GEMMA, {}, 1e6, None, {"theta": 1e4, "scaling": None}),
        (_GEMMA, {"rope_theta": 2e6, "rope_local_base_freq": 2e4}, 2e6, None, {"theta": 2e4, "scaling": None}),
        (_GEMMA, {"rope_scaling": _LINEAR}, 1e6, _OURS, {"theta": 1e4, "scaling": None}),
        (_GEMMA, _nested(_LINEAR, None), 1e6, _OURS, {"theta": 1e4, "scaling": None}),
        (
            _GEMMA,
            _nested(_LINEAR, {"rope_type": "default", "rope_theta": 3e4}),
            1e6,
            _OURS,
            {"theta": 3e4, "scaling": None},
        ),
        (_GEMMA, _nested({}, _LINEAR | {"rope_theta": 3e4}), 1e6, None, {"theta": 3e4, "scaling": _OURS}),
        (_GEMMA, _nested({}, {"rope_theta": 1e6}), 1e6, None, None),
        (_OLMO, {"rope_scaling": _LINEAR}, 5e5, _OURS, {"theta": 5e5, "scaling": None}),
        (_OLMO, {"rope_theta": 1e4}, 1e4, None, None),
        (_OLMO, _nested(_LINEAR | {"rope_theta": 1e4}, None), 1e4, _OURS, {"theta": 5e5, "scaling": None}),
    ],
)
def test_ropes_of_layers_with_windows(form: Format, fields: dict, theta: float, scaling: Any, window: Any) -> None:
    """RoPEs are read as by `convert_rope_params_to_dict` of transformers' Gemma 3 and OLMo 3."""
    expected = {"rope_theta": theta, "rope_scaling": scaling, "rope_fraction": 1.0, "window_rope": window}
    assert _read(fields, form) == expected
    assert _read(fields, form, ("full",)) == expected | {"window_rope": None}


def test_ropes_by_kind_of_layer_that_are_refused() -> None:
    with pytest.raises(
        LlamaJaxError, match="rope_parameters: 'rope_type' is 'linear': expected full_attention and slid"
    ):
        _read({"rope_parameters": _LINEAR}, _GEMMA)
    with pytest.raises(LlamaJaxError, match="x: rope_scaling and rope_parameters differ: expected one of them"):
        _read(_nested({}, {}) | {"rope_scaling": _LINEAR}, _GEMMA)
    with pytest.raises(LlamaJaxError, match="rope_parameters differs by kind of layer .*'full_attention'"):
        _read(_nested(_LINEAR, _LINEAR), _PHI)


@pytest.mark.parametrize("form", [_GEMMA, _OLMO])
def test_written_ropes_of_layers_with_windows(form: Format) -> None:
    """config.json gets both spellings where both can express the RoPEs, otherwise only that of transformers 5."""
    linear = RopeScaling(kind="linear", factor=8.0)
    for window in (None, Rope(theta=1e4), Rope(theta=5e5), Rope(theta=3e5, scaling=YARN)):
        config = Config(**SIZES, rope_theta=5e5, rope_scaling=linear, window_rope=window, layer_kinds=_KINDS, window=8)
        fields = write_rope(config, form)
        read = _read(json.loads(json.dumps(fields)), form)
        assert Config.from_dict(config.to_dict() | {"window_rope": None} | read) == config
        both = window == Rope(theta=5e5) or (form is _GEMMA and window == Rope(theta=1e4))
        assert ("rope_scaling" in fields) == both
    assert fields["rope_parameters"]["full_attention"] == {"rope_theta": 5e5, "rope_type": "linear", "factor": 8.0}


def test_parts_of_heads() -> None:
    for fields in ({"partial_rotary_factor": 0.75}, {"rope_scaling": _LONG_64 | {"partial_rotary_factor": 0.75}}):
        assert _read(fields, _PHI)["rope_fraction"] == 0.75
        with pytest.raises(LlamaJaxError, match="partial_rotary_factor is 0.75, which is not|'partial_rotary_factor'"):
            config_from_hf(HF | fields)
    assert _read({}, _PHI)["rope_fraction"] == 1.0
    config = Config(**SIZES, rope_fraction=0.75)
    assert write_rope(config, _PHI)["partial_rotary_factor"] == 0.75


def test_what_a_family_has_of_its_own_in_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family may keep values of its own in the RoPE object, as Ministral 3 keeps its temperature."""

    def read(keys: Keys) -> dict[str, Any]:
        return {"query_scale": rope_value(keys, "llama_4_scaling_beta")}

    def write(config: Config) -> dict[str, Any]:
        return {"rope_scaling": {"llama_4_scaling_beta": config.query_scale}}

    defaults = {"rope_parameters": _YARN | {"llama_4_scaling_beta": 0.1}, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    form = Format(("mine",), read, write, defaults | {"max_position_embeddings": 2048})
    monkeypatch.setitem(FAMILIES, "mine", Family("mine", huggingface=form))
    monkeypatch.setitem(Config.classes, "mine", Config)
    mine = HF | {"model_type": "mine"}
    default = config_from_hf(mine)
    assert (default.query_scale, default.rope_scaling) == (0.1, YARN)
    for key in ("rope_scaling", "rope_parameters"):
        config = config_from_hf(mine | {key: _YARN | {"llama_4_scaling_beta": 0.2}})
        assert (config.query_scale, config.rope_scaling) == (0.2, YARN)
        assert config_from_hf(config_to_hf(config)) == config
    assert config_from_hf(mine | {"rope_scaling": _YARN}).query_scale is None


# ---- The model ------------------------------------------------------------------------------------------------------

TOKENS = np.random.default_rng(3).integers(0, 32, 24)
_MODELS: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_scaling": dataclasses.replace(DYNAMIC, original_context_length=6)},
    "yarn": {"rope_scaling": dataclasses.replace(YARN, original_context_length=16, mscale=0.7, mscale_all_dim=0.3)},
    "longrope": {"rope_scaling": dataclasses.replace(LONGROPE, original_context_length=6)},
    # As Phi-3: all layers have rings, whose slots do not tell the size of the cache.
    "longrope of windows": {
        "rope_scaling": dataclasses.replace(LONGROPE, original_context_length=6),
        "layer_kinds": ("window",),
        "window": 4,
    },
    "longrope of a part": {
        "rope_scaling": dataclasses.replace(
            LONGROPE, original_context_length=6, short_factors=SHORT[:6], long_factors=LONG[:6]
        ),
        "rope_fraction": 0.75,
    },
    "yarn but of windows": {
        "rope_scaling": dataclasses.replace(YARN, original_context_length=16, truncate=False),
        "window_rope": Rope(theta=100.0),
        "layer_kinds": _KINDS,
        "window": 4,
    },
}


@pytest.mark.parametrize("name", _MODELS)
def test_logits_far_behind_the_original_context(name: str) -> None:
    config = Config(**SIZES, **_MODELS[name])
    model = reference.random_model(config)
    expected = reference.forward(config, reference.switched_weights_of(model), TOKENS)
    np.testing.assert_allclose(forward(model, TOKENS[None])[0], expected, atol=2e-4)


@pytest.mark.parametrize("name", ["dynamic", "longrope", "longrope of windows"])
def test_slots_decide_whatever_the_tokens(name: str) -> None:
    """The slots choose the frequencies, not the number of tokens.

    A text within the original context runs in one piece without a cache, and in two with a cache that reaches beyond.
    """
    config = Config(**SIZES, **_MODELS[name])
    model = reference.random_model(config)
    weights, tokens = reference.switched_weights_of(model), TOKENS[:6]
    within, beyond = (reference.forward(config, weights, tokens, reach=reach) for reach in (6, 24))
    assert abs(within - beyond).max() > 0.1, "the choice must change the logits"
    np.testing.assert_allclose(forward(model, tokens[None])[0], within, atol=2e-4)
    first_1TV, cache = step(model, tokens[None, :3], KVCache.empty(config, 1, 24))
    second_1TV, _ = step(model, tokens[None, 3:], cache)
    np.testing.assert_allclose(np.concatenate([first_1TV[0], second_1TV[0]]), beyond, atol=2e-4)


def test_sizes_that_only_the_caller_knows() -> None:
    """A program that is exported for any cache size chooses its frequencies when it is called."""
    for scaling in (DYNAMIC, LONGROPE):
        rope = Rope(theta=1e4, scaling=scaling)
        program = jax.jit(lambda cache_S, rope=rope: rope_frequencies(rope, 16, cache_S.shape[0]))
        size = jax.export.symbolic_shape("S")
        exported = jax.export.export(program)(jax.ShapeDtypeStruct(size, np.float32))
        for reach in (1, 64, 65, 4096):
            expected = reference.frequencies(Config(**SIZES, rope_scaling=scaling), reach)
            np.testing.assert_allclose(exported.call(np.zeros(reach, np.float32)), expected, rtol=2e-6)


# ---- Requests -------------------------------------------------------------------------------------------------------

REQUESTS = Config(
    **SIZES | {"head_size": 4, "num_layers": 1},
    rope_scaling=dataclasses.replace(
        LONGROPE, original_context_length=256, short_factors=(1.0, 1.5), long_factors=(1.3, 9.0)
    ),
)


def _choices(model: Llama, text: list[int], slots: int) -> np.ndarray:
    """Returns the likeliest token after each token of a text, run in one piece in a cache of `slots` slots."""
    padded = np.asarray([text + [0] * (slots - len(text))])
    return np.argmax(step(model, padded, KVCache.empty(model.config, 1, slots))[0][0], axis=-1)


def test_a_request_chooses_once_by_its_whole_length() -> None:
    """A request reuses an earlier one's cache only if both are on the same side of the original context's length."""
    model, kept = reference.random_model(REQUESTS), Kept()
    text = np.random.default_rng(1).integers(0, 32, 240).tolist()
    # Tokens of the prompt, new tokens, slots, and tokens that are reused.
    for given, new, slots, reused in ((240, 8, 256, 0), (248, 8, 256, 247), (256, 260, 768, 0), (516, 2, 768, 515)):
        made = _continued(model, text[:given], new, kept, slots, reused)
        text = text[:given] + made
        np.testing.assert_array_equal(made, _choices(model, text, slots)[given - 1 : given + new - 1])
    _continued(model, text[:240], 8, kept, 256, 0)


def _continued(model: Llama, text: list[int], new: int, kept: Kept, slots: int, reused: int) -> list[int]:
    """Returns a request's new tokens; asserts its numbers of slots and of reused tokens."""
    run = stream(model, None, text, max_new_tokens=new, temperature=0, kept=kept)
    list(run)
    assert kept.engine is not None
    assert (kept.engine.slots, run.speed.reused_tokens) == (slots, reused)
    return list(run.completions[0].tokens)


def test_an_engine_does_not_grow_beyond_what_chose_its_rope() -> None:
    engine = Engine(reference.random_model(REQUESTS), 1, 256)
    with pytest.raises(LlamaJaxError, match="256 slots cannot grow to 512: the number of slots determines"):
        engine.grow(engine.empty(), 257)
    assert engine.grow(engine.empty(), 200)[0].slots == 256


def test_programs_of_a_bundle_choose_by_its_slots() -> None:
    """Programs of one cache size and programs whose slots the caller gives both choose by the slots."""
    config = Config(**SIZES | {"num_layers": 1}, **_MODELS["longrope"])
    model = reference.random_model(config)
    weights, tokens = reference.switched_weights_of(model), TOKENS[:4]
    made = {slots: functions(model, Spec(slots=slots, buckets=(4,), drafts=1)) for slots in (6, 24)}
    length = np.zeros(1, np.int32)
    sizes = dict(zip("BST", jax.export.symbolic_shape("B, S, T", constraints=["S >= T"]), strict=True))
    symbolic = functions(model, Spec(slots=24, buckets=(4,), drafts=1), sizes)[0]
    of_any_size = jax.export.export(jax.jit(symbolic[1]))(model, *symbolic[2].values())
    for slots in (6, 24):
        expected = reference.forward(config, weights, tokens, reach=slots)[-1]
        name, function, inputs, *_ = made[slots][0]
        state = [np.zeros(inputs[key].shape, np.float32) for key in ("key", "value")]
        arguments = (model, tokens[None].astype(np.int32), length + 4, length, *state)
        assert name == "prefill_4"
        for run in (jax.jit(function), of_any_size.call):
            np.testing.assert_allclose(run(*arguments)[0][0], expected, atol=2e-4)


@pytest.mark.exhaustive
def test_a_bundle_of_rings_alone(tmp_path: Path) -> None:
    """Programs of any size have no array with the cache's slots if all layers have rings: the bundle's slots choose."""
    config = Config(**SIZES, **_MODELS["longrope of windows"])
    model = reference.random_model(config)
    bundle = write(model, None, tmp_path / "bundle", Spec(slots=400, buckets=(4,)), prompts=[[1, 2, 3]])
    ids = TOKENS[:5].tolist()
    options = (f"--ids={','.join(map(str, ids))}", "--max_new_tokens=8")
    for runner in ("run_jax.py", "run_jax_export.py"):
        done = run_isolated(bundle.path, *options, runner=runner)
        assert done.returncode == 0, done.stderr
        made = [int(token) for token in done.stdout.split()]
        logits_TV = reference.forward(config, reference.switched_weights_of(model), np.asarray(ids + made), reach=400)
        assert made == np.argmax(logits_TV, axis=-1)[len(ids) - 1 : -1].tolist()
