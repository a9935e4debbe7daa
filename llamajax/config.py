"""The architecture of a LLaMA: one frozen `Config`, strict readers, and presets by name.

Dimension key used throughout the project, as einsum letters and as suffixes of array names (`query_BTNH`):

    B batch · T new tokens · S cache slots · D model width · N query heads · K key/value heads · G = N/K
    H head size · Q = N x H · M = K x H · F feed-forward width · V vocabulary · L layers · E experts
    C quantization groups along a contraction · P positions of a pattern of layers · R its repeats

`Config` describes architecture only, with the same fields for every family. Run-time choices (dtype, batch, sampling)
are arguments of functions.
"""

import dataclasses
import importlib.resources
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from llamajax.errors import LlamaJaxError
from llamajax.fields import LARGEST_DIMENSION, check_choice, check_flag, check_number, check_whole, only_known
from llamajax.files import read_toml, shortened
from llamajax.parameters import Stack, num_parameters
from llamajax.rope import Rope, RopeScaling, Temperature

LayerKind = Literal["full", "window", "chunk", "nope"]
QueryKeyNorm = Literal["none", "head", "width", "l2"]
Norms = Literal["before", "after", "both"]
Activation = Literal["silu", "gelu_tanh", "relu_squared"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one LLaMA. Hashable, so that it can be static under `jax.jit`.

    Every switch is a field, off by default; `families/` maps the names in each family's files to these fields.

    Attributes:
        vocab_size: V, rows of the embedding.
        width: D, size of the residual stream.
        ffn_width: F, hidden size of the gated feed-forward network.
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads; divides N. N = K is multi-head, K = 1 multi-query attention.
        head_size: H; even, for RoPE pairs. D / N unless said otherwise.
        context_length: the longest sequence that the model was trained for, in tokens.
        norm_eps: epsilon, added inside the square root of RMSNorm.
        rope_theta: base of the RoPE frequencies.
        rope_scaling: stretching of the RoPE frequencies, or None.
        tied_embeddings: whether the head shares the embedding's weights.
        family: the names in files of such a model (`families.FAMILIES`); it has no effect on the forward pass.
        layer_kinds: kinds of the layers, a repeating pattern. "full" layers see all earlier positions, "window" layers
            the last `window` (Mistral 7B, Jiang et al. 2023, arXiv:2310.06825), "chunk" layers those from the last
            multiple of `chunk` on (Llama 4); "nope" layers see all, without RoPE (SmolLM3; Yang et al. 2025,
            arXiv:2501.18795).
        window: positions that a query of a "window" layer sees, its own included.
        chunk: length of the chunks of "chunk" layers.
        rope_fraction: the fraction of each head that RoPE rotates, its first coordinates (Phi-4 mini: 0.75).
        window_rope: RoPE of "window" layers if it differs from the others' (Gemma 3, OLMo 3).
        qkv_bias: biases of query, key and value (Qwen2).
        out_bias: a bias of attention's output.
        ffn_bias: biases of gate, up and down.
        query_key_norm: RMSNorm of queries and keys: of each "head" before RoPE (Qwen3), over the full "width" before
            RoPE (OLMo 2), or "l2", of each head after RoPE and without weights (Llama 4).
        sinks: an extra logit in the softmax of each query head (gpt-oss).
        score_cap: c in c tanh(score / c), which caps attention scores (Gemma 2).
        logit_cap: c in the same cap of logits (Gemma 2).
        query_scale: factor of the scores (Gemma, Granite); None for 1 / sqrt(H).
        query_temperature: factor of the queries, by position (Ministral 3, Llama 4).
        norms: position of the norms: "before" attention and feed-forward, "after" (OLMo 2) or "both" (Gemma 2).
        norm_offset: added to a norm's weights: 1 for those that begin at 0 (Gemma).
        sub_norms: norms before the output and the down projection (BitNet b1.58).
        activation: activation function of the gate: "silu", "gelu_tanh" (Gemma), "relu_squared" (BitNet b1.58; So et
            al. 2021, arXiv:2109.08668).
        embedding_scale: factor of the embeddings (Gemma: sqrt(D); Granite).
        residual_scale: factor of the outputs of attention and feed-forward before they are added (Granite).
        logit_scale: factor of the logits (Granite: 1 / logits_scaling).

    Raises:
        LlamaJaxError: for a value that no LLaMA can have, naming the field.
    """

    vocab_size: int
    width: int
    ffn_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    context_length: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    family: str = "llama"
    layer_kinds: tuple[LayerKind, ...] = ("full",)
    window: int | None = None
    chunk: int | None = None
    rope_fraction: float = 1.0
    window_rope: Rope | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    query_key_norm: QueryKeyNorm = "none"
    sinks: bool = False
    score_cap: float | None = None
    logit_cap: float | None = None
    query_scale: float | None = None
    query_temperature: Temperature | None = None
    norms: Norms = "before"
    norm_offset: float = 0.0
    sub_norms: bool = False
    activation: Activation = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    def __post_init__(self):
        """Refuse values that cannot describe a LLaMA."""
        for name in _WHOLE_FIELDS:
            check_whole(name, getattr(self, name), MOST_LAYERS if name == "num_layers" else LARGEST_DIMENSION)
        check_number("norm_eps", self.norm_eps, low=0.0)
        check_number("rope_theta", self.rope_theta, low=1.0)
        check_flag("tied_embeddings", self.tied_embeddings)
        if self.num_heads % self.num_kv_heads:
            raise LlamaJaxError(
                f"num_heads is {self.num_heads}: expected a multiple of num_kv_heads, {self.num_kv_heads}"
            )
        if self.head_size % 2:
            raise LlamaJaxError(f"head_size is {self.head_size}: expected an even number, RoPE rotates pairs")
        self._check_switches()

    def _check_switches(self) -> None:
        """Refuse invalid values of switches."""
        for name in ("qkv_bias", "out_bias", "ffn_bias", "sinks", "sub_norms"):
            check_flag(name, getattr(self, name))
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), get_args(choices))
        for name in ("score_cap", "logit_cap", "query_scale"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=0.0, above=True)
        for name in ("embedding_scale", "residual_scale", "logit_scale"):
            check_number(name, getattr(self, name), low=0.0, above=True)
        check_number("norm_offset", self.norm_offset, low=0.0)
        check_number("rope_fraction", self.rope_fraction, low=0.0, above=True)
        if self.rope_fraction > 1 or self.rotated_size % 2 or not self.rotated_size:
            raise LlamaJaxError(
                f"rope_fraction is {self.rope_fraction}: expected an even part of a head of {self.head_size}"
            )
        if not isinstance(self.layer_kinds, tuple) or not 1 <= len(self.layer_kinds) <= MOST_LAYERS:
            raise LlamaJaxError(f"layer_kinds is {shortened(self.layer_kinds)}: expected kinds of layers")
        for kind in self.layer_kinds:
            check_choice("layer_kinds", kind, get_args(LayerKind))
        for name in ("window", "chunk"):
            value, used = getattr(self, name), name in self.layer_kinds
            if used != (value is not None):
                raise LlamaJaxError(
                    f"{name} is {shortened(value)}: expected {'a length' if used else 'None'}, {name!r} is "
                    f"{'one' if used else 'none'} of layer_kinds"
                )
            if value is not None:
                check_whole(name, value)
        if self.window_rope is not None and "window" not in self.layer_kinds:
            raise LlamaJaxError("window_rope is given: expected None, 'window' is none of layer_kinds")
        for rope in {self.rope(kind) for kind in self.layer_kinds}:
            if rope is not None:
                rope.check(self.rotated_size)

    # The config class of each family that has its own, by the family's name; `Config` for the default family.
    classes: ClassVar[dict[str, type["Config"]]] = {}

    def __init_subclass__(cls, **options: Any):
        """Registers a family's own config class: a frozen dataclass with a `family`, which may override the methods."""
        super().__init_subclass__(**options)
        Config.classes[cls.family] = cls

    @property
    def sizes(self) -> dict[str, int]:
        """The length of each axis of weights, by its letter."""
        return {
            "V": self.vocab_size,
            "D": self.width,
            "F": self.ffn_width,
            "Q": self.num_heads * self.head_size,
            "M": self.num_kv_heads * self.head_size,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "H": self.head_size,
        }

    @property
    def rotated_size(self) -> int:
        """The number of coordinates of a head that RoPE rotates: its first ones."""
        return int(self.head_size * self.rope_fraction)

    @property
    def score_scale(self) -> float:
        """The factor of attention scores."""
        return self.head_size**-0.5 if self.query_scale is None else self.query_scale

    def kind(self, layer: int) -> LayerKind:
        """The kind of a layer."""
        return self.layer_kinds[layer % len(self.layer_kinds)]

    def rope(self, kind: LayerKind) -> Rope | None:
        """The RoPE of layers of a kind; None for layers without RoPE."""
        if kind == "nope":
            return None
        if kind == "window" and self.window_rope is not None:
            return self.window_rope
        return Rope(theta=self.rope_theta, scaling=self.rope_scaling)

    def rope_choice(self, reach: int) -> tuple[Hashable, ...]:
        """Returns the RoPE variant that a request's positions select; keys of another variant cannot be reused."""
        ropes = [self.rope(kind) for kind in self.layer_kinds]
        return tuple(None if rope is None else rope.choice(reach) for rope in ropes)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The layers as repeating patterns; an incomplete pattern at the end is a separate stack."""
        return planned(tuple(self.kind(layer) for layer in range(self.num_layers)))

    def numbers(self, layer: int) -> Mapping[str, float]:
        """Numbers that differ between layers and are passed to their blocks; none here."""
        return {}

    @property
    def num_parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        return num_parameters(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values, switches only if they are on; `from_dict` reads them back."""
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in _SWITCHES or value != _SWITCHES[field.name]:
                nested = isinstance(value, RopeScaling | Rope)
                plain[field.name] = value.to_dict() if nested else value
        if self.query_temperature is not None:
            plain["query_temperature"] = dataclasses.asdict(self.query_temperature)
        if "layer_kinds" in plain:
            plain["layer_kinds"] = list(self.layer_kinds)
        return plain

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "config") -> "Config":
        """Builds a Config from `to_dict`'s form (checkpoint manifests, `configs/*.toml`).

        Raises:
            LlamaJaxError: for an unknown or missing key, or a value out of range; the message begins with `source`.
        """
        try:
            cls = _of_family(cls, fields)
            fields = only_known(cls, fields)
            for name, kind in _NESTED.items():
                if fields.get(name) is not None:
                    fields[name] = kind.from_dict(fields[name])
            if fields.get("query_temperature") is not None:
                fields["query_temperature"] = Temperature(**only_known(Temperature, fields["query_temperature"]))
            if isinstance(fields.get("layer_kinds"), list):
                fields["layer_kinds"] = tuple(fields["layer_kinds"])
            return cls(**fields)
        except LlamaJaxError as error:
            raise LlamaJaxError(f"{source}: {error}") from None


Config.classes[Config.family] = Config

_WHOLE_FIELDS = (
    "vocab_size",
    "width",
    "ffn_width",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "context_length",
)
_CHOICES = {"query_key_norm": QueryKeyNorm, "norms": Norms, "activation": Activation}
_NESTED: dict[str, Any] = {"rope_scaling": RopeScaling, "window_rope": Rope}
# Fields outside of `_ALWAYS` are switches; a manifest leaves them out at their defaults, a LLaMA's.
_ALWAYS = (*_WHOLE_FIELDS, "norm_eps", "rope_theta", "rope_scaling", "tied_embeddings")
_SWITCHES = {field.name: field.default for field in dataclasses.fields(Config) if field.name not in _ALWAYS}
MOST_LAYERS = 1 << 12  # limited because each layer has a name
_MOST_POSITIONS = 12  # of a pattern; the size of a program grows with them


def planned(kinds: tuple[str, ...]) -> tuple[Stack, ...]:
    """Divides layers of the given kinds into stacks: the shortest repeating pattern, or runs of equal layers."""
    count = len(kinds)
    for size in range(1, min(_MOST_POSITIONS, count // 2) + 1):
        repeats = count // size
        if kinds[: size * repeats] == kinds[:size] * repeats and (size == 1 or repeats > 1):
            rest = kinds[size * repeats :]
            if rest == kinds[: len(rest)]:
                return (Stack(0, kinds[:size], repeats), *_runs(rest, size * repeats))
    return _runs(kinds, 0)


def _runs(kinds: tuple[str, ...], first: int) -> tuple[Stack, ...]:
    """Makes a stack for each run of equal layers."""
    stacks: list[Stack] = []
    for number, kind in enumerate(kinds, first):
        if stacks and stacks[-1].pattern == (kind,):
            stacks[-1] = dataclasses.replace(stacks[-1], repeats=stacks[-1].repeats + 1)
        else:
            stacks.append(Stack(number, (kind,), 1))
    return tuple(stacks)


def _of_family(cls: type[Config], fields: Any) -> type[Config]:
    """Returns the config class of the family that `fields` name."""
    if not isinstance(fields, Mapping) or "family" not in fields:
        return cls
    check_choice("family", fields["family"], Config.classes)
    return Config.classes[fields["family"]]


# ---- Presets --------------------------------------------------------------------------------------------------------


def preset_folder() -> Path:
    """Returns the folder of the preset files: inside an installed package, or beside the package in a checkout."""
    installed = Path(str(importlib.resources.files("llamajax"))) / "configs"
    return installed if installed.is_dir() else installed.parent.parent / "configs"


def preset_names() -> list[str]:
    """Returns the names that `preset` knows, sorted."""
    return sorted(path.stem for path in preset_folder().glob("*.toml"))


def preset(name: str) -> Config:
    """Returns the architecture of a published LLaMA without weights, for example `preset("llama3.2-1b")`.

    Raises:
        LlamaJaxError: for a name that is not in `preset_names()`.
    """
    if name not in preset_names():
        raise LlamaJaxError(f"no preset is called {name!r}: expected one of {', '.join(preset_names())}")
    path = preset_folder() / f"{name}.toml"
    return Config.from_dict(read_toml(path), str(path))
