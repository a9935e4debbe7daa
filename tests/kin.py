"""Small models, one for each group of switches that families add, on which tests repeat what they do with a LLaMA."""

import dataclasses

from llamajax import Config
from llamajax.config import Temperature
from llamajax.rope import Rope, RopeScaling

_BASE = Config(
    vocab_size=96,
    width=32,
    ffn_width=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    context_length=128,
)

# Like Qwen2: biases, and a tied head.
BIASES = dataclasses.replace(_BASE, qkv_bias=True, tied_embeddings=True, norm_eps=1e-6)
# Like Qwen3: norms of queries and keys, a head size other than width / heads.
HEAD_NORMS = dataclasses.replace(_BASE, query_key_norm="head", head_size=16, rope_theta=1e6)
# Like Gemma 3 with Gemma 2's caps: two stacks (whole patterns of layers, and the remaining layer), windows with a RoPE
# of their own.
WINDOWS = dataclasses.replace(
    _BASE,
    num_layers=5,
    layer_kinds=("window", "full"),
    window=6,
    window_rope=Rope(theta=1e3),
    rope_theta=1e5,
    rope_scaling=RopeScaling(kind="linear", factor=8.0),
    norms="both",
    norm_offset=1.0,
    query_key_norm="head",
    activation="gelu_tanh",
    embedding_scale=32**0.5,
    query_scale=0.3,
    score_cap=50.0,
    logit_cap=30.0,
    tied_embeddings=True,
)
# Like OLMo 2: norms only after each half of a layer, queries and keys normed over their whole width.
NORMS_AFTER = dataclasses.replace(_BASE, norms="after", query_key_norm="width")
# Like BitNet b1.58: norms before the output and the down projection, squared ReLU.
SUB_NORMS = dataclasses.replace(_BASE, sub_norms=True, activation="relu_squared", tied_embeddings=True)
# All remaining switches at once.
REST = dataclasses.replace(
    _BASE,
    layer_kinds=("chunk", "nope"),
    chunk=8,
    rope_fraction=0.5,
    out_bias=True,
    ffn_bias=True,
    qkv_bias=True,
    sinks=True,
    query_key_norm="l2",
    query_temperature=Temperature(beta=0.1, length=8, offset=1, only_nope=True),
    residual_scale=0.5,
    logit_scale=0.25,
)
KIN = {
    "biases": BIASES,
    "head norms": HEAD_NORMS,
    "windows": WINDOWS,
    "norms after": NORMS_AFTER,
    "sub-norms": SUB_NORMS,
    "rest": REST,
}
