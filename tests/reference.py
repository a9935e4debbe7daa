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

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from llamajax import Config, Llama, abstract_model
from llamajax.checkpoint import huggingface
from llamajax.checkpoint.naming import named_leaves

Weights = dict[str, np.ndarray]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Zhang & Sennrich 2019, equation 4, epsilon inside the root."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * weight


def frequencies(config: Config) -> np.ndarray:
    """Radians a token of each pair, [H/2]."""
    result = []
    for i in range(config.head_size // 2):
        frequency = 1.0 / config.rope_theta ** (2 * i / config.head_size)
        scaling = config.rope_scaling
        if scaling is not None and scaling.kind == "linear":
            # Position interpolation as its paper has it: position m is taken for m / factor.
            frequency = frequency * (1 / scaling.factor)
        elif scaling is not None:
            # Llama 3.1, by wavelengths, case by case.
            wavelength = 2 * math.pi / frequency
            longest_kept = scaling.original_context_length / scaling.high_freq_factor
            shortest_slowed = scaling.original_context_length / scaling.low_freq_factor
            if wavelength > shortest_slowed:
                frequency = frequency / scaling.factor
            elif wavelength >= longest_kept:
                smooth = scaling.original_context_length / wavelength - scaling.low_freq_factor
                smooth /= scaling.high_freq_factor - scaling.low_freq_factor
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        result.append(frequency)
    return np.array(result)


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


def causal_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """One head: each position over itself and those before it; [T, H] three times -> [T, H]."""
    result = np.empty_like(query)
    for t in range(len(query)):
        result[t] = softmax(key[: t + 1] @ query[t] / math.sqrt(query.shape[-1])) @ value[: t + 1]
    return result


def attention(config: Config, weights: Weights, prefix: str, x: np.ndarray, neighbours: bool) -> np.ndarray:
    """Grouped-query attention of one layer, [T, D] -> [T, D]."""
    size, frequency = config.head_size, frequencies(config)
    project = {name: x @ weights[f"{prefix}.{name}_proj.weight"].T for name in "qkv"}
    heads = []
    for n in range(config.num_heads):
        shared = n * config.num_kv_heads // config.num_heads
        query = project["q"][:, n * size : (n + 1) * size]
        key, value = (project[name][:, shared * size : (shared + 1) * size] for name in "kv")
        query, key = (
            np.stack([rotate(vector, t, frequency, neighbours) for t, vector in enumerate(vectors)])
            for vectors in (query, key)
        )
        heads.append(causal_attention(query, key, value))
    return np.concatenate(heads, axis=-1) @ weights[f"{prefix}.o_proj.weight"].T


def feed_forward(weights: Weights, prefix: str, x: np.ndarray) -> np.ndarray:
    """SwiGLU (Shazeer 2020): (swish(x W) * x V) W2."""
    gate, up = (x @ weights[f"{prefix}.{name}_proj.weight"].T for name in ("gate", "up"))
    return (gate / (1 + np.exp(-gate)) * up) @ weights[f"{prefix}.down_proj.weight"].T


def forward(config: Config, weights: Weights, tokens: np.ndarray, neighbours: bool = False) -> np.ndarray:
    """Logits [T, V] of one sequence of token ids [T]."""
    x = weights["model.embed_tokens.weight"][np.asarray(tokens)].astype(np.float64)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        normed = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], config.norm_eps)
        x = x + attention(config, weights, f"{prefix}.self_attn", normed, neighbours)
        normed = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], config.norm_eps)
        x = x + feed_forward(weights, f"{prefix}.mlp", normed)
    x = rms_norm(x, weights["model.norm.weight"], config.norm_eps)
    return x @ weights["model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"].T


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
    abstract = abstract_model(config, dtype)
    leaves = []
    for name, leaf in named_leaves(abstract).items():
        values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(leaf.shape)
        if name.endswith("weight_D"):
            values = 1 + 0.3 * values
        else:
            fan_in = leaf.shape[-2] if name.startswith("layers.") else leaf.shape[-1]
            # Small embeddings, so that the first norm's epsilon is felt.
            values = values * (0.05 if name == "embed_VD" else 1 / math.sqrt(fan_in))
        leaves.append(jnp.asarray(values, dtype))
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def weights_of(model: Llama) -> Weights:
    """A model's weights, or gradients, in Hugging Face's names and orientation, float64."""
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save(model, Path(folder))
        return {name: array.astype(np.float64) for name, array in load_file(Path(folder) / "model.safetensors").items()}
