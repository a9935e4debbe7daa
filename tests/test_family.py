"""A family defined in this file alone: its block, specs, reader, and a cache of its own.

The block has biases on q, k and v and a norm on each head of q and k; every other layer sees a window. Layers with a
window keep their keys and values in a ring.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llamajax
from llamajax import Config, Llama, checkpoint
from llamajax.caches import PARTS, Part, Scores, Where
from llamajax.caches.attention import attend
from llamajax.checkpoint.source import Source, float_weights
from llamajax.layer_weights import params
from llamajax.model import matmul
from llamajax.parameters import KINDS, Kind, Spec, Stack, specs, weights_of
from llamajax.quantization.quantize import quantize
from llamajax.rope import Rope, apply_rope, rope_frequencies
from quant import start_indices, values
from quant.recipe import Rule
from tests.programs import forward

# ---- The family: block, specs, config, reader ------------------------------------------------------------------------


def _matrix(axes: str, input: str, maker: str) -> Spec:
    return Spec(axes=axes, over=axes[0], roles=("product",), input=input, maker=maker)


SPECS: Mapping[str, Spec] = {
    "norm_D": Spec(axes="D", roles=("norm",), init="ones"),
    "query_DQ": _matrix("DQ", "attention", "norm_D"),
    "key_DM": _matrix("DM", "attention", "norm_D"),
    "value_DM": _matrix("DM", "attention", "norm_D"),
    "query_bias_Q": Spec(axes="Q", roles=("bias",)),
    "key_bias_M": Spec(axes="M", roles=("bias",)),
    "value_bias_M": Spec(axes="M", roles=("bias",)),
    "query_norm_H": Spec(axes="H", roles=("norm",), init="ones"),
    "key_norm_H": Spec(axes="H", roles=("norm",), init="ones"),
    "out_QD": _matrix("QD", "out", ""),
    "ffn_norm_D": Spec(axes="D", roles=("norm",), init="ones"),
    "up_DF": _matrix("DF", "ffn", "ffn_norm_D"),
    "down_FD": _matrix("FD", "down", "up_DF"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowedConfig(Config):
    family: str = "windowed"
    window: int | None = 5
    layer_kinds: tuple[Any, ...] = ("window", "full")

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return (Stack(0, ("windowed-local", "windowed-global"), self.num_layers // 2),)

    def numbers(self, layer: int) -> Mapping[str, float]:
        return {"window": self.window} if layer % 2 == 0 else {}


def _frequencies(config: Config) -> jax.Array:
    return rope_frequencies(Rope(theta=config.rope_theta), config.head_size)


def _rms(x: jax.Array, weight: nnx.Param, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight[...]


class WindowedBlock(nnx.Module):
    def __init__(self, config: Config, *, key: jax.Array, dtype: Any):
        self.config = config
        for name, param in zip(SPECS, params("", tuple(SPECS), config, key, dtype, "windowed-local"), strict=True):
            setattr(self, name, param)

    def __call__(self, x_BTD: jax.Array, where: Where, cache: Any, at: Any) -> tuple[jax.Array, Any]:
        c, (B, T, _) = self.config, x_BTD.shape
        normed_BTD = _rms(x_BTD, self.norm_D, c.norm_eps)

        def project(weight: nnx.Param, bias: nnx.Param) -> jax.Array:
            return (matmul(normed_BTD, weight) + bias[...]).reshape(B, T, -1, c.head_size)

        rope = functools.partial(apply_rope, position_BT=where.position_BT, frequency=_frequencies(c))
        query_BTNH = _rms(project(self.query_DQ, self.query_bias_Q), self.query_norm_H, c.norm_eps)
        key_BTKH = _rms(project(self.key_DM, self.key_bias_M), self.key_norm_H, c.norm_eps)
        value_BTKH = project(self.value_DM, self.value_bias_M)
        query_BTNH = rope(query_BTNH, scale=c.head_size**-0.5)
        scores = Scores(window=at.numbers.get("window"))
        mixed_BTNH, cache = at.attend(cache, query_BTNH, rope(key_BTKH), value_BTKH, where, scores)
        x_BTD = x_BTD + matmul(mixed_BTNH.reshape(B, T, -1), self.out_QD)
        up_BTF = matmul(_rms(x_BTD, self.ffn_norm_D, c.norm_eps), self.up_DF)
        return x_BTD + matmul(jax.nn.gelu(up_BTF, approximate=True), self.down_FD), cache


KINDS["windowed-local"] = Kind(WindowedBlock, lambda config: SPECS, cache="ring")
KINDS["windowed-global"] = Kind(WindowedBlock, lambda config: SPECS)


def recognise(path: Path) -> bool:
    return path.suffix == ".npz"


def open_source(path: Path, ignore_keys: Any = ()) -> Source:
    arrays = np.load(path, allow_pickle=False)
    config = Config.from_dict(json.loads(str(arrays["config"])), str(path))
    read = lambda place: arrays[str(place)]  # noqa: E731
    return Source("windowed", config, float_weights(config, np.float32), tuple(specs(config)), read)


# ---- A cache of its own ----------------------------------------------------------------------------------------------

_STEP = 256  # the most tokens that one call may write


def _rest(x: jax.Array, by: int) -> jax.Array:
    """Returns the remainder of x / by for x >= 0, by operations that every runtime has."""
    return x - jax.lax.div(x, jnp.full_like(x, by)) * by


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingPart(Part):
    """Slot s holds the newest position p with p mod slots = s; there are _STEP more slots than the window has."""

    key_LBKSH: jax.Array
    value_LBKSH: jax.Array
    slots = None
    spare = _STEP

    @classmethod
    def empty(cls, config: Any, layers: int, batch: int, slots: int, dtype: str, layout: str) -> "RingPart":
        shape = (layers, batch, config.num_kv_heads, config.window + _STEP, config.head_size)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def attend(self, layer, query_BTNH, key_BTKH, value_BTKH, where, scores):
        B, T = query_BTNH.shape[:2]
        S = self.key_LBKSH.shape[3]

        def write(i, slots):
            row, token = jax.lax.div(i, jnp.int32(T)), _rest(i, T)
            start = jax.lax.dynamic_index_in_dim(where.start_B, row, keepdims=False)
            at = start_indices(layer, row, 0, _rest(start + token, S), 0)
            take = lambda x: jax.lax.dynamic_slice(x, start_indices(row, token, 0, 0), (1, 1, *x.shape[2:]))  # noqa: E731
            new = [jnp.swapaxes(take(x), 1, 2)[None].astype(slots[0].dtype) for x in (key_BTKH, value_BTKH)]
            return tuple(jax.lax.dynamic_update_slice(old, one, at) for old, one in zip(slots, new, strict=True))

        key_LBKSH, value_LBKSH = jax.lax.fori_loop(0, B * T, write, (self.key_LBKSH, self.value_LBKSH))
        last_B1 = where.start_B[:, None] + T - 1
        position_BS = last_B1 - _rest(last_B1 + S - jnp.arange(S, dtype=jnp.int32), S)
        position_BS = jnp.where(position_BS < 0, 1 << 30, position_BS)  # an unwritten slot
        key_BKSH, value_BKSH = (jax.lax.dynamic_index_in_dim(x, layer, 0, False) for x in (key_LBKSH, value_LBKSH))
        mixed_BTNH = attend(query_BTNH, key_BKSH, value_BKSH, where.position_BT, scores, position_BS)
        return mixed_BTNH, RingPart(key_LBKSH, value_LBKSH)


PARTS["ring"] = RingPart.empty

# ---- What is expected: NumPy, float64, position by position ----------------------------------------------------------

CONFIG = WindowedConfig(
    vocab_size=64,
    width=32,
    ffn_width=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    context_length=1024,
    window=5,
)
PROMPT = [int(i) for i in np.random.default_rng(1).integers(0, 64, 21)]


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + CONFIG.norm_eps) * weight


def _rope(head: np.ndarray, position: int) -> np.ndarray:
    half = len(head) // 2
    turn = np.exp(1j * position * CONFIG.rope_theta ** (-np.arange(half) / half))
    turned = (head[:half] + 1j * head[half:]) * turn
    return np.concatenate([turned.real, turned.imag])


def expected(weights: Mapping[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Returns the logits [T, V] of one text."""
    x, group = weights["embed_VD"][tokens], CONFIG.num_heads // CONFIG.num_kv_heads
    for layer in range(CONFIG.num_layers):
        w = {name: weights[f"layers.{layer}.{name}"] for name in SPECS}
        window = CONFIG.window if layer % 2 == 0 else len(tokens)
        h = _norm(x, w["norm_D"])
        q = _norm((h @ w["query_DQ"] + w["query_bias_Q"]).reshape(len(tokens), -1, 8), w["query_norm_H"])
        k = _norm((h @ w["key_DM"] + w["key_bias_M"]).reshape(len(tokens), -1, 8), w["key_norm_H"])
        v = (h @ w["value_DM"] + w["value_bias_M"]).reshape(len(tokens), -1, 8)
        mixed = np.zeros_like(q)
        for t in range(len(tokens)):
            seen = range(max(0, t - window + 1), t + 1)
            for n in range(CONFIG.num_heads):
                score = np.array([_rope(q[t, n], t) @ _rope(k[s, n // group], s) for s in seen]) / np.sqrt(8)
                weight = np.exp(score - score.max())
                mixed[t, n] = weight / weight.sum() @ v[list(seen), n // group]
        x = x + mixed.reshape(len(tokens), -1) @ w["out_QD"]
        up = _norm(x, w["ffn_norm_D"]) @ w["up_DF"]
        x = x + 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))) @ w["down_FD"]
    return _norm(x, weights["norm.weight_D"]) @ weights["head_VD"].T


def greedy(weights: Mapping[str, np.ndarray], prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(expected(weights, tokens)[-1])))
    return tokens[len(prompt) :]


def dense(model: Llama) -> dict[str, np.ndarray]:
    return {str(place): np.asarray(values(weight), np.float64) for place, weight in weights_of(model).items()}


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    made = {}
    for place, spec in specs(CONFIG).items():
        noise = generator.normal(0, 0.3 if spec.is_matrix else 0.2, spec.shape(CONFIG))
        made[str(place)] = (noise + (spec.init == "ones")).astype(np.float32)
    return made


@pytest.fixture(scope="module")
def model(arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Llama:
    path = tmp_path_factory.mktemp("windowed") / "model.npz"
    np.savez(path, config=json.dumps(CONFIG.to_dict()), **arrays)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "READERS", [(recognise, open_source), *checkpoint.READERS])
        return llamajax.load(path)[0]


def test_logits_and_text_are_numpys(model: Llama, arrays: dict[str, np.ndarray]) -> None:
    assert type(model.config) is WindowedConfig and model.config == CONFIG
    logits_TV = expected({name: array.astype(np.float64) for name, array in arrays.items()}, PROMPT)
    np.testing.assert_allclose(forward(model, np.asarray([PROMPT], np.int32))[0], logits_TV, atol=1e-4)
    made = llamajax.generate(model, None, PROMPT, temperature=0, max_new_tokens=12)
    assert made.tokens == greedy(dense(model), PROMPT, 12)


@pytest.mark.exhaustive  # tests/test_rings.py covers the library's own rings
def test_long_prompts_turn_the_ring(model: Llama) -> None:
    prompt = [int(i) for i in np.random.default_rng(2).integers(0, 64, CONFIG.window + _STEP + 30)]
    made = llamajax.generate(model, None, prompt, temperature=0, max_new_tokens=2)
    logits_BTV = forward(model, np.asarray([prompt], np.int32))
    assert made.tokens[0] == int(jnp.argmax(logits_BTV[0, -1]))
    np.testing.assert_allclose(logits_BTV[0, -1], expected(dense(model), prompt)[-1], atol=2e-4)


def test_speculation_goes_back_in_the_ring(model: Llama) -> None:
    prompt = PROMPT[:6] * 5
    options = {"temperature": 0, "max_new_tokens": 12}
    plain = llamajax.generate(model, None, prompt, **options)
    assert llamajax.generate(model, None, prompt, speculate=4, **options).tokens == plain.tokens
    assert plain.tokens == greedy(dense(model), prompt, 12)


RULES = (
    Rule(weights="*norm*", keep=True),
    Rule(weights="*bias*", keep=True),
    Rule(weights="layers.1.*", scheme="int8", group_size=16),
    Rule(weights="*", scheme="int4", group_size=16, clip="mse"),
)
CALIBRATED = (
    *RULES[:2],
    Rule(weights="layers.*.down_FD", scheme="int4", group_size=16, method="gptq"),
    Rule(weights="layers.*.[qkv]*", scheme="int4", group_size=16, scaling="awq"),
    Rule(weights="*", scheme="int8", group_size=16),
)


@pytest.mark.matrix
@pytest.mark.parametrize("calibrated", [False, True])
def test_quantized_text_is_numpys(model: Llama, calibrated: bool, tmp_path: Path) -> None:
    text = np.random.default_rng(3).integers(0, 64, 640) if calibrated else None
    packed = quantize(model, CALIBRATED if calibrated else RULES, calibration=text, window=64)
    assert packed.stacks[0][0].down_FD.get_value().scheme.name == "int4"
    llamajax.save_checkpoint(packed, tmp_path / "packed")
    loaded, _ = llamajax.load(tmp_path / "packed")
    assert type(loaded.config) is WindowedConfig
    made = llamajax.generate(llamajax.prepare(loaded, "cpu"), None, PROMPT, temperature=0, max_new_tokens=8)
    assert made.tokens == greedy(dense(packed), PROMPT, 8)


def test_a_bundle_runs_it(model: Llama, tmp_path: Path) -> None:
    from export.bundle import write
    from export.profiles import Spec as Programs
    from export.verification import verify

    packed = quantize(model, RULES)
    bundle = write(packed, None, tmp_path / "bundle", Programs(slots=128, buckets=(16,)), prompts=[PROMPT])
    names = [state["name"] for state in bundle.manifest["cache"]["state"]]
    assert names == ["key_0", "value_0", "key_1", "value_1"]
    (result,) = verify(bundle, ["jax"])
    assert result.held and result.exact, result
    import safetensors.numpy

    golden = safetensors.numpy.load_file(bundle.file("golden.safetensors"))
    assert golden["tokens_0"][:12].tolist() == greedy(dense(packed), PROMPT, 12)


def test_what_its_layers_show(model: Llama) -> None:
    tokens = jnp.asarray([PROMPT], jnp.int32)
    _, _, captured = jax.jit(lambda model: model(tokens, capture=("attention", "hidden")))(model)
    assert captured["attention"].shape == (4, 1, 4, 21, 21) and captured["hidden"].shape == (4, 1, 21, 32)
    behind_window = captured["attention"][0, 0, :, 20, : 21 - CONFIG.window]
    assert float(behind_window.max()) == 0 and float(captured["attention"][1, 0, :, 20, 0].min()) > 0
    with pytest.raises(llamajax.LlamaJaxError, match="'ffn_out' of layer 0: expected one of attention, hidden, and"):
        model(tokens, capture=("ffn_out",))


def test_the_family_is_small() -> None:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    marks = [i for i, line in enumerate(lines) if line.startswith("# ---- ")]
    family, cache = (sum(bool(line.strip()) for line in lines[a:b]) for a, b in zip(marks[:2], marks[1:3], strict=True))
    assert family <= 100 and cache <= 60
