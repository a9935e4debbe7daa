"""An independent LLaMA in float64 NumPy, against which the JAX model is tested.

Written from the papers, one sequence at a time, a loop over layers, heads and positions, no batch, no cache, no mask.
Weights are a dict in Hugging Face's names and orientation, `[out, in]`; `weights_of` takes them from a model through
`llamajax.checkpoint.huggingface.save`, so that the mapping of names and orientations is tested as well.

RoPE is a product of complex numbers here, real sines and cosines in the model. `neighbours=True` is Meta's layout (and
llama2.c's), in which a head's elements 2i and 2i + 1 are a pair; otherwise i and i + H/2 are.
"""

import math
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from llamajax import Config, Llama, RopeScaling, abstract_model
from llamajax.checkpoint import huggingface
from llamajax.model import model_from
from llamajax.parameters import named_arrays

Weights = dict[str, np.ndarray]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Zhang & Sennrich 2019, equation 4, epsilon inside the root."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * weight


def frequencies(config: Config, reach: int = 0) -> np.ndarray:
    """Radians a token of each pair, [H/2], of a request that reaches so many positions."""
    size, theta, scaling = config.head_size, config.rope_theta, config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic" and reach > scaling.original_context_length:
        # NTK-aware: theta such that the slowest pair turns as much slower as linear scaling would make it.
        stretch = scaling.factor * reach / scaling.original_context_length - scaling.factor + 1
        theta = theta * stretch ** (size / (size - 2))
    result = []
    for i in range(size // 2):
        frequency = 1.0 / theta ** (2 * i / size)
        turns = 0 if scaling is None else scaling.original_context_length * frequency / (2 * math.pi)
        if scaling is not None and scaling.kind == "linear":
            # Position interpolation as its paper has it: position m is taken for m / factor.
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
    """How much of pair i YaRN interpolates: a line between the pairs that turn beta_fast and beta_slow times.

    The authors' code (github.com/jquesnelle/yarn, `find_correction_range`), of which the paper's line in the number of
    turns is another form. gpt-oss does not round the pairs.
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
    """What YaRN and longrope multiply rotated coordinates by.

    0.1 ln s + 1 (YaRN, 3.4), a ratio of two such (DeepSeek V2), or sqrt(1 + ln s / ln L) (longrope, 3.3).
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


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def attention_weights(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """One head: what each position takes of itself and those before it; [T, H] twice -> [T, T], zeros above."""
    result = np.zeros((len(query), len(query)))
    for t in range(len(query)):
        result[t, : t + 1] = softmax(key[: t + 1] @ query[t] / math.sqrt(query.shape[-1]))
    return result


def causal_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """One head: each position over itself and those before it; [T, H] three times -> [T, H]."""
    return attention_weights(query, key) @ value


def attention(
    config: Config, weights: Weights, prefix: str, x: np.ndarray, neighbours: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Grouped-query attention of one layer, [T, D] -> [T, D], and its weights [N, T, T]."""
    size, frequency = config.head_size, frequencies(config)
    project = {name: x @ weights[f"{prefix}.{name}_proj.weight"].T for name in "qkv"}
    heads, maps = [], []
    for n in range(config.num_heads):
        shared = n * config.num_kv_heads // config.num_heads
        query = project["q"][:, n * size : (n + 1) * size]
        key, value = (project[name][:, shared * size : (shared + 1) * size] for name in "kv")
        query, key = (
            np.stack([rotate(vector, t, frequency, neighbours) for t, vector in enumerate(vectors)])
            for vectors in (query, key)
        )
        maps.append(attention_weights(query, key))
        heads.append(causal_attention(query, key, value))
    return np.concatenate(heads, axis=-1) @ weights[f"{prefix}.o_proj.weight"].T, np.stack(maps)


def feed_forward(weights: Weights, prefix: str, x: np.ndarray) -> np.ndarray:
    """SwiGLU (Shazeer 2020): (swish(x W) * x V) W2."""
    gate, up = (x @ weights[f"{prefix}.{name}_proj.weight"].T for name in ("gate", "up"))
    return (gate / (1 + np.exp(-gate)) * up) @ weights[f"{prefix}.down_proj.weight"].T


class Pass(NamedTuple):
    """What one forward pass computed on the way.

    Attributes:
        logits: [T, V].
        hidden: the residual stream behind each layer, [L, T, D].
        attention: its weights, [L, N, T, T].
        attention_out: what attention adds to the residual stream, [L, T, D].
        ffn_out: what the feed-forward half adds, [L, T, D].
    """

    logits: np.ndarray
    hidden: np.ndarray
    attention: np.ndarray
    attention_out: np.ndarray
    ffn_out: np.ndarray


def trace(config: Config, weights: Weights, tokens: np.ndarray, neighbours: bool = False) -> Pass:
    """One sequence of token ids [T], with all that a model can be asked to show."""
    x = weights["model.embed_tokens.weight"][np.asarray(tokens)].astype(np.float64)
    layers = []
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        normed = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], config.norm_eps)
        mixed, maps = attention(config, weights, f"{prefix}.self_attn", normed, neighbours)
        x = x + mixed
        normed = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], config.norm_eps)
        added = feed_forward(weights, f"{prefix}.mlp", normed)
        x = x + added
        layers.append((x, maps, mixed, added))
    return Pass(head(config, weights, x), *(np.stack(each) for each in zip(*layers, strict=True)))


def head(config: Config, weights: Weights, x: np.ndarray) -> np.ndarray:
    """The final norm and the output embeddings, [T, D] -> [T, V]."""
    x = rms_norm(x, weights["model.norm.weight"], config.norm_eps)
    return x @ weights["model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"].T


def forward(config: Config, weights: Weights, tokens: np.ndarray, neighbours: bool = False) -> np.ndarray:
    """Logits [T, V] of one sequence of token ids [T]."""
    return trace(config, weights, tokens, neighbours).logits


def loss(config: Config, weights: Weights, rows: np.ndarray) -> float:
    """Mean negative log-likelihood, in nats, of each token after the first of its row [B, T]."""
    losses = []
    for row in rows:
        probability = softmax(forward(config, weights, row[:-1]))
        losses += [-math.log(probability[t, token]) for t, token in enumerate(row[1:])]
    return float(np.mean(losses))


# ---- Models to compare with it --------------------------------------------------------------------------------------


def random_model(config: Config, seed: int = 0, dtype: jax.typing.DTypeLike = jnp.float32) -> Llama:
    """A model in which everything matters: the usual initialization has norms of one and nearly uniform attention.

    A leaf's values depend on the seed, its name and its shape only, so that two configs can share their weights.
    """
    made = {}
    for name, leaf in named_arrays(abstract_model(config, dtype)).items():
        values = np.random.default_rng([seed, zlib.crc32(name.replace("*.", "").encode())]).standard_normal(leaf.shape)
        if name.endswith("weight_D"):
            values = 1 + 0.3 * values
        else:
            fan_in = leaf.shape[-2] if name.startswith("layers.") else leaf.shape[-1]
            # Small embeddings, so that the first norm's epsilon is felt.
            values = values * (0.05 if name == "embed_VD" else 1 / math.sqrt(fan_in))
        made[name] = jnp.asarray(values, dtype)
    return model_from(made, config)


def weights_of(model: Llama) -> Weights:
    """A model's weights, or gradients, in Hugging Face's names and orientation, float64."""
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save(model, Path(folder))
        return {name: array.astype(np.float64) for name, array in load_file(Path(folder) / "model.safetensors").items()}
