"""An independent LLaMA with the variants of other families in float64 NumPy, against which the JAX model is tested.

Written from the papers and, where families have none, from transformers' `modeling_*.py`. It takes one sequence at a
time and loops over layers, heads and positions, with no batch, no cache and no mask. Weights are a dict in Hugging
Face's names and orientation, `[out, in]`. `weights_of` takes a LLaMA's weights from a model through
`llamajax.checkpoint.huggingface.save`, which also tests the mapping of names and orientations. `switched_weights_of`
takes the weights of a model of any config, by its own table of names.

RoPE is a product of complex numbers here, real sines and cosines in the model. `neighbours=True` is Meta's layout (and
llama2.c's), in which a head's elements 2i and 2i + 1 are a pair; otherwise i and i + H/2 are.
"""

import dataclasses
import functools
import math
import tempfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from llamajax import Config, Llama, RopeScaling, abstract_model
from llamajax.checkpoint import huggingface
from llamajax.model import model_from
from llamajax.parameters import leaves, named_arrays
from llamajax.parameters import weights_of as single_weights
from quant import values

Weights = dict[str, np.ndarray]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm: Zhang & Sennrich 2019, equation 4, epsilon inside the root."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * weight


def frequencies(config: Config, reach: int = 0) -> np.ndarray:
    """Returns each pair's radians per token, [H/2], for a request that reaches `reach` positions."""
    size, theta, scaling = config.head_size, config.rope_theta, config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic" and reach > scaling.original_context_length:
        # NTK-aware: theta is such that the slowest pair slows down as much as by linear scaling.
        stretch = scaling.factor * reach / scaling.original_context_length - scaling.factor + 1
        theta = theta * stretch ** (size / (size - 2))
    result = []
    for i in range(size // 2):
        frequency = 1.0 / theta ** (2 * i / size)
        turns = 0 if scaling is None else scaling.original_context_length * frequency / (2 * math.pi)
        if scaling is not None and scaling.kind == "linear":
            # Position interpolation as in its paper: position m is taken for m / factor.
            frequency = frequency * (1 / scaling.factor)
        elif scaling is not None and scaling.kind == "longrope":
            long = reach > scaling.original_context_length
            frequency = frequency / (scaling.long_factors if long else scaling.short_factors)[i]
        elif scaling is not None and scaling.kind == "yarn":
            share = _interpolated(scaling, theta, size, i)
            frequency = share * frequency / scaling.factor + (1 - share) * frequency
        elif scaling is not None and scaling.kind == "llama3":
            # By wavelengths, case by case.
            if turns < scaling.low_freq_factor:
                frequency = frequency / scaling.factor
            elif turns <= scaling.high_freq_factor:
                smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        result.append(frequency)
    return np.array(result)


def _interpolated(scaling: RopeScaling, theta: float, size: int, i: int) -> float:
    """Returns how much of pair i YaRN interpolates: linear between the pairs that turn beta_fast and beta_slow times.

    This is the authors' code (github.com/jquesnelle/yarn, `find_correction_range`); the paper's line in the number of
    turns is another form of it. gpt-oss does not round the pairs.
    """
    edge = [
        size / 2 * math.log(scaling.original_context_length / (2 * math.pi * turns), theta)
        for turns in (scaling.beta_fast, scaling.beta_slow)
    ]
    if scaling.truncate:
        edge = [math.floor(edge[0]), math.ceil(edge[1])]
    first, last = max(edge[0], 0), min(edge[1], size - 1)
    if i <= first:
        return 0.0
    return 1.0 if i >= last else (i - first) / (last - first)


def rope_factor(config: Config) -> float:
    """Returns the factor by which YaRN and longrope multiply rotated coordinates.

    It is 0.1 ln s + 1 (YaRN, 3.4), a ratio of two such terms (DeepSeek V2), or sqrt(1 + ln s / ln L) (longrope, 3.3).
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    grown = math.log(scaling.factor)
    if scaling.kind == "longrope":
        return math.sqrt(1 + grown / math.log(scaling.original_context_length))
    above, below = scaling.mscale or 1, scaling.mscale_all_dim or 0
    if not (scaling.mscale and scaling.mscale_all_dim):
        above, below = 1, 0
    return (0.1 * above * grown + 1) / (0.1 * below * grown + 1)


def rotate(head: np.ndarray, position: int, frequency: np.ndarray, neighbours: bool = False) -> np.ndarray:
    """RoPE of one head's vector [H] (Su et al. 2021, equation 12: multiplication by e^(i m theta))."""
    half = len(head) // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if neighbours else (slice(0, half), slice(half, None))
    turned = (head[first] + 1j * head[second]) * np.exp(1j * position * frequency)
    result = np.empty_like(head)
    result[first], result[second] = turned.real, turned.imag
    return result


def turned(config: Config, kind: str, head: np.ndarray, position: int, reach: int, neighbours: bool) -> np.ndarray:
    """Rotates the first coordinates of a head's vector [H] to its position, by the RoPE of that kind of layer."""
    if kind == "nope":
        return head
    plain: dict[str, Any] = {"layer_kinds": ("full",), "window": None, "chunk": None, "window_rope": None}
    if kind == "window" and config.window_rope is not None:
        plain |= {"rope_theta": config.window_rope.theta, "rope_scaling": config.window_rope.scaling}
    size = int(config.rope_fraction * config.head_size)
    alone = dataclasses.replace(config, head_size=size, rope_fraction=1.0, **plain)
    first = rotate(head[:size], position, frequencies(alone, reach), neighbours) * rope_factor(alone)
    return np.concatenate([first, head[size:]])


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def first_seen(config: Config, kind: str, t: int) -> int:
    """Returns the first position that position t sees in a layer of a kind.

    A window of W is t - W + 1 … t (Mistral 7B, section 2); chunks begin at multiples of their length (Llama 4).
    """
    if kind == "window":
        return max(0, t + 1 - config.window)
    return config.chunk * (t // config.chunk) if kind == "chunk" else 0


def attention_weights(
    query: np.ndarray, key: np.ndarray, config: Config | None = None, kind: str = "full", sink: float | None = None
) -> np.ndarray:
    """Returns one head's weights of each position on itself and those before: [T, H] twice -> [T, T], zeros elsewhere.

    Scores are q k / sqrt(H) or times another scale, capped by c tanh(s / c) (Gemma 2, section 2). They share the
    softmax with a sink, whose weight is then dropped (transformers' `modeling_gpt_oss.py`, `eager_attention_forward`).
    """
    result = np.zeros((len(query), len(query)))
    scale = 1 / math.sqrt(query.shape[-1])
    if config is not None and config.query_scale is not None:
        scale = config.query_scale
    for t in range(len(query)):
        first = 0 if config is None else first_seen(config, kind, t)
        score = key[first : t + 1] @ query[t] * scale
        if config is not None and config.score_cap is not None:
            score = config.score_cap * np.tanh(score / config.score_cap)
        if sink is None:
            result[t, first : t + 1] = softmax(score)
        else:
            result[t, first : t + 1] = softmax(np.append(score, sink))[:-1]
    return result


def causal_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """One head: each position attends to itself and those before it; [T, H] three times -> [T, H]."""
    return attention_weights(query, key) @ value


def held(key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a head's keys and values as queries see them: unchanged; tests of caches that round replace this."""
    return key, value


def linear(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """Returns x W^T, plus a bias where there is one."""
    made = x @ weights[f"{name}.weight"].T
    return made + weights[f"{name}.bias"] if f"{name}.bias" in weights else made


def temperature(config: Config, kind: str, position: int) -> float:
    """Returns the factor of a query at a position.

    `_get_llama_4_attn_scale` of transformers' `modeling_ministral3.py`; `attn_scale` of `modeling_llama4.py`, where
    only layers without RoPE have it.
    """
    warm = config.query_temperature
    if warm is None or (warm.only_nope and kind != "nope"):
        return 1.0
    return 1 + warm.beta * math.log(1 + (position + warm.offset) // warm.length)


def attention(
    config: Config,
    weights: Weights,
    prefix: str,
    x: np.ndarray,
    neighbours: bool,
    kind: str = "full",
    reach: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Grouped-query attention of one layer: returns [T, D] -> [T, D], and its weights [N, T, T]."""
    size = config.head_size
    project = {name: linear(weights, f"{prefix}.{name}_proj", x) for name in "qkv"}

    def normed(name: str, vector: np.ndarray) -> np.ndarray:
        return rms_norm(vector, config.norm_offset + weights[f"{prefix}.{name}_norm.weight"], config.norm_eps)

    def placed(name: str, vectors: np.ndarray) -> np.ndarray:
        """Returns one head's queries or keys after norms and RoPE, in the order of their family."""
        if config.query_key_norm == "head":
            vectors = normed(name, vectors)
        turn = functools.partial(turned, config, kind, reach=reach or len(vectors), neighbours=neighbours)
        vectors = np.stack([turn(vector, t) for t, vector in enumerate(vectors)])
        if config.query_key_norm == "l2" and kind != "nope":
            vectors = vectors / np.sqrt(np.mean(vectors**2, axis=-1, keepdims=True) + config.norm_eps)
        return vectors

    if config.query_key_norm == "width":
        project |= {name: normed(name, project[name]) for name in "qk"}
    heads, maps = [], []
    for n in range(config.num_heads):
        shared = n * config.num_kv_heads // config.num_heads
        query = placed("q", project["q"][:, n * size : (n + 1) * size])
        query = query * np.array([[temperature(config, kind, t)] for t in range(len(x))])
        key, value = (project[name][:, shared * size : (shared + 1) * size] for name in "kv")
        sink = weights[f"{prefix}.sinks"][n] if config.sinks else None
        key, value = held(placed("k", key), value)
        maps.append(attention_weights(query, key, config, kind, sink))
        heads.append(maps[-1] @ value)
    mixed = np.concatenate(heads, axis=-1)
    if config.sub_norms:
        mixed = normed("attn_sub", mixed)
    return linear(weights, f"{prefix}.o_proj", mixed), np.stack(maps)


def activation(config: Config | None, x: np.ndarray) -> np.ndarray:
    """Swish (Ramachandran et al. 2017), GELU by its tanh form (Hendrycks & Gimpel 2016, section 2), or ReLU squared."""
    name = "silu" if config is None else config.activation
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return np.maximum(x, 0) ** 2 if name == "relu_squared" else x / (1 + np.exp(-x))


def feed_forward(weights: Weights, prefix: str, x: np.ndarray, config: Config | None = None) -> np.ndarray:
    """A gated feed-forward network (Shazeer 2020): (swish(x W) * x V) W2."""
    gate, up = (linear(weights, f"{prefix}.{name}_proj", x) for name in ("gate", "up"))
    wide = activation(config, gate) * up
    if config is not None and config.sub_norms:
        weight = config.norm_offset + weights[f"{prefix}.ffn_sub_norm.weight"]
        wide = rms_norm(wide, weight, config.norm_eps)
    return linear(weights, f"{prefix}.down_proj", wide)


class Pass(NamedTuple):
    """What one forward pass computes on the way.

    Attributes:
        logits: [T, V].
        hidden: the residual stream after each layer, [L, T, D].
        attention: attention weights, [L, N, T, T].
        attention_out: what attention adds to the residual stream, [L, T, D].
        ffn_out: what the feed-forward half adds, [L, T, D].
    """

    logits: np.ndarray
    hidden: np.ndarray
    attention: np.ndarray
    attention_out: np.ndarray
    ffn_out: np.ndarray


# A layer's norms, in Hugging Face's names, before and after each of its two halves.
_NORMS = {
    "before": (("input_layernorm", None), ("post_attention_layernorm", None)),
    "after": ((None, "post_attention_layernorm"), (None, "post_feedforward_layernorm")),
    "both": (
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}


def trace(
    config: Config, weights: Weights, tokens: np.ndarray, neighbours: bool = False, reach: int | None = None
) -> Pass:
    """Runs one sequence of token ids [T], and returns all that a model can be asked to show.

    `reach` is how many positions there may be, T by default: dynamic NTK and longrope choose by it.
    """
    x = weights["model.embed_tokens.weight"][np.asarray(tokens)].astype(np.float64) * config.embedding_scale
    layers = []
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        kind = config.layer_kinds[layer % len(config.layer_kinds)]

        def half(function: Any, names: tuple[str | None, str | None], x: np.ndarray, prefix: str = prefix) -> Any:
            """Returns what one half of a layer adds, and the further results of its function."""

            def normed(name: str | None, x: np.ndarray) -> np.ndarray:
                if name is None:
                    return x
                return rms_norm(x, config.norm_offset + weights[f"{prefix}.{name}.weight"], config.norm_eps)

            made, *rest = function(normed(names[0], x))
            return normed(names[1], made) * config.residual_scale, *rest

        first, second = _NORMS[config.norms]
        attend = functools.partial(
            attention, config, weights, f"{prefix}.self_attn", neighbours=neighbours, kind=kind, reach=reach
        )
        mixed, maps = half(attend, first, x)
        x = x + mixed
        (added,) = half(lambda x, prefix=prefix: (feed_forward(weights, f"{prefix}.mlp", x, config),), second, x)
        x = x + added
        layers.append((x, maps, mixed, added))
    return Pass(head(config, weights, x), *(np.stack(each) for each in zip(*layers, strict=True)))


def head(config: Config, weights: Weights, x: np.ndarray) -> np.ndarray:
    """The final norm and the output embeddings, scaled and then capped, [T, D] -> [T, V]."""
    x = rms_norm(x, config.norm_offset + weights["model.norm.weight"], config.norm_eps)
    logits = x @ weights["model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"].T
    logits = logits * config.logit_scale
    return logits if config.logit_cap is None else config.logit_cap * np.tanh(logits / config.logit_cap)


def forward(
    config: Config, weights: Weights, tokens: np.ndarray, neighbours: bool = False, reach: int | None = None
) -> np.ndarray:
    """Logits [T, V] of one sequence of token ids [T]; `reach` as in `trace`."""
    return trace(config, weights, tokens, neighbours, reach).logits


def loss(config: Config, weights: Weights, rows: np.ndarray) -> float:
    """Mean negative log-likelihood, in nats, of each token after the first of its row [B, T]."""
    losses = []
    for row in rows:
        probability = softmax(forward(config, weights, row[:-1]))
        losses += [-math.log(probability[t, token]) for t, token in enumerate(row[1:])]
    return float(np.mean(losses))


# ---- Models to compare with it --------------------------------------------------------------------------------------


def random_model(config: Config, seed: int = 0, dtype: jax.typing.DTypeLike = jnp.float32) -> Llama:
    """Returns a model in which all parts matter; others begin with norms of 1, biases of 0, near-uniform attention.

    A leaf's values depend on the seed, its name and its shape only, so that two configs can share their weights.
    """
    made = {}
    for name, leaf in named_arrays(abstract_model(config, dtype)).items():
        values = np.random.default_rng([seed, zlib.crc32(name.replace("*.", "").encode())]).standard_normal(leaf.shape)
        spec = leaves(config)[name].spec
        if "norm" in spec.roles:
            values = 1 - spec.offset + 0.3 * values
        elif "bias" in spec.roles:
            values = 0.5 * values
        else:
            fan_in = leaf.shape[-2] if name.startswith("layers.") else leaf.shape[-1]
            # Embeddings are small, so that the first norm's epsilon matters.
            values = values * (0.05 if name == "embed_VD" else 1 / math.sqrt(fan_in))
        made[name] = jnp.asarray(values, dtype)
    return model_from(made, config)


def weights_of(model: Llama) -> Weights:
    """Returns a model's weights, or gradients, in Hugging Face's names and orientation, float64."""
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save(model, Path(folder))
        return {name: array.astype(np.float64) for name, array in load_file(Path(folder) / "model.safetensors").items()}


_MATRICES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"} | {
    name: f"{name}_proj" for name in ("gate", "up", "down")
}
_VECTORS = {"query_norm": "q_norm", "key_norm": "k_norm", "sub_norm": "attn_sub_norm"}


def switched_weights_of(model: Llama) -> Weights:
    """Like `weights_of`, for any config, even if no family has it; quantized weights become their values."""
    config, found = model.config, {}
    for (name, layer), weight in single_weights(model).items():
        array = np.asarray(values(weight), np.float64)
        found[_theirs(config, name, layer)] = array.T if layer is not None and array.ndim == 2 else array
    return found


def _theirs(config: Config, name: str, layer: int | None) -> str:
    """Returns Hugging Face's name for a weight."""
    if layer is None:
        whole = {"embed_VD": "embed_tokens", "norm.weight_D": "norm"}
        return f"model.{whole[name]}.weight" if name in whole else "lm_head.weight"
    half, _, rest = name.partition(".")
    rest = rest.rpartition("_")[0]
    if rest == "weight":
        place = 0 if half.startswith("attention") else 1
        return f"model.layers.{layer}.{_NORMS[config.norms][place]['after' in half]}.weight"
    prefix = f"model.layers.{layer}.{'self_attn' if half == 'attention' else 'mlp'}"
    if rest == "sinks":
        return f"{prefix}.sinks"
    if rest.endswith("_bias"):
        return f"{prefix}.{_MATRICES[rest.removesuffix('_bias')]}.bias"
    vectors = _VECTORS | ({"sub_norm": "ffn_sub_norm"} if half == "ffn" else {})
    return f"{prefix}.{(_MATRICES | vectors)[rest]}.weight"
