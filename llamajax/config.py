"""What a LLaMA looks like: one frozen `Config`, strict readers, and presets by name.

Dimension key used throughout the project, as einsum letters and as suffixes of array names (`query_BTNH`):

    B batch · T new tokens · S cache slots · D model width · N query heads · K key/value heads · G = N/K
    H head size · Q = N x H · M = K x H · F feed-forward width · V vocabulary · L layers · E experts
    C quantization groups along a contraction · P positions of a pattern of layers · R its repeats

`Config` describes architecture only. Run-time choices (dtype, batch, sampling) are arguments of functions.
"""

import dataclasses
import importlib.resources
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from llamajax.errors import LlamaJaxError
from llamajax.files import read_toml, shortened
from llamajax.parameters import Stack, num_parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE frequencies are stretched beyond the trained context.

    `linear` divides every frequency by `factor` (Chen et al. 2023, arXiv:2306.15595). `llama3` leaves short
    wavelengths alone, divides long ones by `factor` and blends in between (Llama 3.1; reference: `apply_scaling` in
    meta-llama/llama-models).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192

    def __post_init__(self):
        """Refuse values that cannot describe a scaling."""
        if self.kind not in ("linear", "llama3"):
            raise LlamaJaxError(
                f"rope scaling kind {shortened(self.kind)} is not supported: expected 'linear' or 'llama3'"
            )
        _check_number("rope scaling factor", self.factor, low=1.0)
        _check_number("low_freq_factor", self.low_freq_factor, low=0.0)
        _check_number("high_freq_factor", self.high_freq_factor, low=0.0)
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise LlamaJaxError(
                f"high_freq_factor is {self.high_freq_factor}: expected more than low_freq_factor, "
                f"{self.low_freq_factor}"
            )
        _check_whole("original_context_length", self.original_context_length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one LLaMA. Hashable, so that it can be static under `jax.jit`.

    Attributes:
        vocab_size: V, rows of the embedding.
        width: D, size of the residual stream.
        ffn_width: F, hidden size of the SwiGLU feed-forward network.
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads; divides N. N = K is multi-head, K = 1 multi-query attention.
        head_size: H; even, for RoPE pairs. D / N unless said otherwise.
        context_length: the longest sequence that the model was trained for, in tokens.
        norm_eps: epsilon inside the square root of RMSNorm.
        rope_theta: base of the RoPE frequencies.
        rope_scaling: stretching of the RoPE frequencies, or None.
        tied_embeddings: whether the head shares the embedding's weights.

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

    def __post_init__(self):
        """Refuse values that cannot describe a LLaMA."""
        for name in _WHOLE_FIELDS:
            _check_whole(name, getattr(self, name), _MOST_LAYERS if name == "num_layers" else _LARGEST_DIMENSION)
        _check_number("norm_eps", self.norm_eps, low=0.0)
        _check_number("rope_theta", self.rope_theta, low=1.0)
        if not isinstance(self.tied_embeddings, bool):
            raise LlamaJaxError(f"tied_embeddings is {shortened(self.tied_embeddings)}: expected true or false")
        if self.num_heads % self.num_kv_heads:
            raise LlamaJaxError(
                f"num_heads is {self.num_heads}: expected a multiple of num_kv_heads, {self.num_kv_heads}"
            )
        if self.head_size % 2:
            raise LlamaJaxError(f"head_size is {self.head_size}: expected an even number, RoPE rotates pairs")

    # What a manifest calls configs of this class; those of a subclass are found by its own (`from_dict`).
    family: ClassVar[str] = "llama"
    _families: ClassVar[dict[str, type["Config"]]] = {}

    def __init_subclass__(cls, **options: Any):
        """A family of its own: a frozen dataclass with a `family`, and what it has otherwise of the below."""
        super().__init_subclass__(**options)
        Config._families[cls.family] = cls

    @property
    def sizes(self) -> dict[str, int]:
        """How long the axis of each letter is that weights have."""
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
    def stacks(self) -> tuple[Stack, ...]:
        """The layers, as patterns that repeat: layers of one kind, where nothing says otherwise."""
        return (Stack(0, ("llama",), self.num_layers),)

    def numbers(self, layer: int) -> Mapping[str, float]:
        """What of a layer is a number of its own, as its window or theta: passed to its block; nothing here."""
        return {}

    @property
    def num_parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        return num_parameters(self)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, and the family if it is another; `from_dict` reads them back."""
        return dataclasses.asdict(self) | ({} if self.family == Config.family else {"family": self.family})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "config") -> "Config":
        """Builds a Config from `to_dict`'s form (checkpoint manifests, `configs/*.toml`).

        Raises:
            LlamaJaxError: for an unknown or missing key, or a value out of range; the message begins with `source`.
        """
        try:
            cls, fields = _of_family(cls, fields)
            fields = _only_known(cls, fields)
            if fields.get("rope_scaling") is not None:
                fields["rope_scaling"] = RopeScaling(**_only_known(RopeScaling, fields["rope_scaling"]))
            return cls(**fields)
        except LlamaJaxError as error:
            raise LlamaJaxError(f"{source}: {error}") from None


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

# No LLaMA comes near this. A header that claims more is damaged or hostile: refused before anything is allocated.
_LARGEST_DIMENSION = 1 << 27
_MOST_LAYERS = 1 << 12  # and each has a name


def _check_whole(name: str, value: Any, most: int = _LARGEST_DIMENSION) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise LlamaJaxError(f"{name} is {shortened(value)}: expected a whole number from 1 to {most}")


def _check_number(name: str, value: Any, *, low: float) -> None:
    # Compared rather than math.isfinite, which raises for whole numbers beyond the range of float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= sys.float_info.max:
        raise LlamaJaxError(f"{name} is {shortened(value)}: expected a finite number, at least {low}")


def _of_family(cls: type[Config], fields: Any) -> tuple[type[Config], Any]:
    """The class that `fields` are of, and the fields without their family."""
    if not isinstance(fields, Mapping) or "family" not in fields:
        return cls, fields
    family = fields["family"]
    known = {Config.family: Config} | Config._families
    if not isinstance(family, str) or family not in known:
        raise LlamaJaxError(f"family is {shortened(family)}: expected one of {', '.join(known)}")
    return known[family], {name: value for name, value in fields.items() if name != "family"}


def _only_known(cls: type, fields: Any) -> dict[str, Any]:
    """`fields`, once it is sure that `cls` has each of them and that none without a default is missing."""
    if not isinstance(fields, Mapping):
        raise LlamaJaxError(f"{cls.__name__} is {shortened(fields)}: expected a table of fields")
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(str(key) for key in fields if key not in known)
    if unknown:
        raise LlamaJaxError(f"unknown key {shortened(unknown[0])}: {cls.__name__} has {', '.join(known)}")
    required = [name for name, field in known.items() if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in fields]
    if missing:
        raise LlamaJaxError(f"missing key {missing[0]!r}: {cls.__name__} needs {', '.join(required)}")
    return dict(fields)


# ---- Hugging Face's config.json -------------------------------------------------------------------------------------

_HF_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "ffn_width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_size",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "tied_embeddings",
}

_HF_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Keys that change nothing in the forward pass whatever they say: provenance, training, and what decides words, which
# `checkpoint.huggingface_words` reads.
_HF_NO_EFFECT = frozenset(
    "_name_or_path _commit_hash _attn_implementation _attn_implementation_autoset _attn_implementation_internal "
    "_flash_attn_2_enabled _from_model_config architectures attn_implementation auto_map bos_token bos_token_id "
    "chunk_size_feed_forward cls_token_id custom_pipelines decoder_start_token_id dtype eos_token eos_token_id "
    "ffn_dim_multiplier finetuning_task gradient_checkpointing id2label initializer_range is_composition is_decoder "
    "is_encoder_decoder is_llama_config label2id license mask_token_id max_seq_len max_sequence_length "
    "model_max_length model_name multiple_of neftune_noise_alpha original_max_position_embeddings "
    "output_attentions output_hidden_states pad_token pad_token_id prefix pretraining_tp problem_type return_dict "
    "rope_interleaved sep_token_id seq_length task_specific_params tf_legacy_loss tokenizer_class torch_dtype "
    "torchscript transformers.js_config transformers_weights unk_token unk_token_id use_bfloat16 use_cache "
    "use_flash_attention use_flash_attention_2".split()
)
# Defaults of text generation, which transformers 4 kept in config.json.
_HF_GENERATION = frozenset(
    "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
    "epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id "
    "length_penalty max_length max_new_tokens min_length min_new_tokens min_p no_repeat_ngram_size num_beam_groups "
    "num_beams num_return_sequences output_scores penalty_alpha remove_invalid_values renormalize_logits "
    "repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p".split()
)
# The names of training frameworks, of versions, and of dropout, which inference does without.
_HF_NO_EFFECT_PATTERN = re.compile(r"unsloth_\w+|\w+_version|\w*dropout\w*|\w+_pdrop")

# Keys that would change the forward pass: allowed only at the value at which they do nothing.
_HF_ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "bias": (False, None),
    "qkv_bias": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "pruned_heads": ({}, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
}
_HF_READ = frozenset({"rope_scaling", "rope_parameters", *_HF_NAMES, *_HF_ONLY_VALUE})


def config_from_hf(fields: Mapping[str, Any], source: str = "config.json", ignore_keys: Collection[str] = ()) -> Config:
    """Reads the `config.json` of a Hugging Face LlamaForCausalLM.

    Both spellings of RoPE are read: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (5).
    Defaults are those of transformers' LlamaConfig.

    Args:
        fields: the JSON object.
        source: what messages begin with.
        ignore_keys: keys to read over, for those that this model does not know and that change no forward pass.

    Raises:
        LlamaJaxError: for a key that is neither read nor known to be without effect, or one whose value asks for
            something that this model does not do. Nothing is dropped silently.
    """
    if not isinstance(fields, Mapping):
        raise LlamaJaxError(f"{source}: expected a JSON object, got {type(fields).__name__}")
    needed = sorted(set(ignore_keys) & {"model_type", "rope_scaling", "rope_parameters", *_HF_NAMES})
    if needed:
        raise LlamaJaxError(f"{needed[0]!r} cannot be ignored: the model is made by it")
    fields = {key: value for key, value in fields.items() if key not in ignore_keys}
    if fields.get("model_type") != "llama":
        raise LlamaJaxError(f"{source}: model_type is {shortened(fields.get('model_type'))}: expected 'llama'")
    for key, allowed in _HF_ONLY_VALUE.items():
        if key in fields and fields[key] not in allowed:
            raise LlamaJaxError(
                f"{source}: {key} is {shortened(fields[key])}, which is not supported: expected {allowed[0]!r}"
            )
    unknown = sorted(str(key) for key in fields if not _is_known(str(key)))
    if unknown:
        raise LlamaJaxError(
            f"{source}: unknown key {shortened(unknown[0])}: if it does not change the forward pass, give "
            f"--ignore_key={shortened(unknown[0])[1:-1]} (ignore_keys in the library), or remove it "
            f"(read: {', '.join(sorted(_HF_READ))})"
        )
    missing = [key for key in _HF_REQUIRED if fields.get(key) is None]
    if missing:
        raise LlamaJaxError(f"{source}: missing key {missing[0]!r}: expected {', '.join(_HF_REQUIRED)}")
    ours = {_HF_NAMES[key]: value for key, value in fields.items() if key in _HF_NAMES and value is not None}
    ours.setdefault("context_length", 2048)
    ours.setdefault("norm_eps", 1e-6)
    ours.setdefault("tied_embeddings", False)
    ours.setdefault("num_kv_heads", ours.get("num_heads"))
    if "head_size" not in ours and isinstance(ours.get("width"), int) and isinstance(ours.get("num_heads"), int):
        ours["head_size"] = ours["width"] // max(ours["num_heads"], 1)
    ours |= _rope_from_hf(fields, ours["context_length"], source)
    return Config.from_dict(ours, source)


def _is_known(key: str) -> bool:
    """Whether a key of config.json is read, or known to be without effect."""
    return key in _HF_READ | _HF_NO_EFFECT | _HF_GENERATION or bool(_HF_NO_EFFECT_PATTERN.fullmatch(key))


def _rope_from_hf(fields: Mapping[str, Any], context_length: Any, source: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` in our names, from whichever spelling is there; they must agree if both are."""
    read = []
    for key in ("rope_scaling", "rope_parameters"):
        if fields.get(key) is not None:
            # transformers gives the length outside the object precedence over the one in it.
            original = fields.get("original_max_position_embeddings")
            read.append(_rope_object(fields[key], original, context_length, f"{source}: {key}"))
    if len(read) == 2 and read[0] != read[1]:
        raise LlamaJaxError(f"{source}: rope_scaling and rope_parameters differ: expected one of them")
    return read[0] if read else {}


# Of no effect where RoPE is not scaled; transformers writes some of them there.
_ROPE_NAMES = frozenset(
    "factor low_freq_factor high_freq_factor original_max_position_embeddings attention_factor beta_fast beta_slow "
    "mscale mscale_all_dim truncate short_factor long_factor".split()
)


def _rope_object(value: Any, original: Any, context_length: Any, source: str) -> dict[str, Any]:
    """One object of RoPE parameters in our names, as transformers 5 reads it for a LLaMA.

    Args:
        value: of `rope_scaling` or `rope_parameters`.
        original: `original_max_position_embeddings` outside the object, or None.
        context_length: what the original length is where nothing says it.
        source: what messages begin with.
    """
    if not isinstance(value, Mapping):
        raise LlamaJaxError(f"{source} is {shortened(value)}: expected an object")
    if value and all(isinstance(part, Mapping) for part in value.values()):
        raise LlamaJaxError(
            f"{source} differs by kind of layer ({shortened(sorted(map(str, value)))}), which a LLaMA's does not: "
            "expected one rope_type and its values"
        )
    rope = {key: part for key, part in value.items() if part is not None or key in ("rope_type", "type")}
    ours = {"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {}
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    kinds = [rope.pop(key) for key in ("rope_type", "type") if key in rope]
    # Nothing but a theta is what transformers calls the default type.
    kind = "default" if not kinds and not rope else kinds[0] if kinds and kinds.count(kinds[0]) == len(kinds) else None
    if kind == "default" and set(rope) <= _ROPE_NAMES:
        return ours
    names = {"factor": "factor"}
    if kind == "linear":
        rope.pop("original_max_position_embeddings", None)  # of no effect there
    if kind == "llama3":
        names |= {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
        names |= {"original_max_position_embeddings": "original_context_length"}
        rope.setdefault("original_max_position_embeddings", context_length)
        if original is not None:
            rope["original_max_position_embeddings"] = original
    if kind not in ("linear", "llama3") or set(rope) != set(names):
        raise LlamaJaxError(
            f"{source}: RoPE scaling {shortened(kind)} with {shortened(sorted(map(str, rope)))} is not supported: "
            "expected 'linear' with factor, or 'llama3' with factor, low_freq_factor, high_freq_factor, "
            "original_max_position_embeddings"
        )
    return ours | {"rope_scaling": {"kind": kind} | {names[key]: part for key, part in rope.items()}}


def config_to_hf(config: Config) -> dict[str, Any]:
    """The `config.json` that transformers reads as the same model (inverse of `config_from_hf`)."""
    fields: dict[str, Any] = {hf: getattr(config, ours) for hf, ours in _HF_NAMES.items()}
    fields |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    if config.rope_scaling is not None:
        scaling = {"rope_type": config.rope_scaling.kind, "factor": config.rope_scaling.factor}
        if config.rope_scaling.kind == "llama3":
            scaling["low_freq_factor"] = config.rope_scaling.low_freq_factor
            scaling["high_freq_factor"] = config.rope_scaling.high_freq_factor
            scaling["original_max_position_embeddings"] = config.rope_scaling.original_context_length
        fields["rope_scaling"] = scaling
    return fields


# ---- Presets --------------------------------------------------------------------------------------------------------


def preset_folder() -> Path:
    """Where the preset files are: inside an installed package, or beside the package in a checkout."""
    installed = Path(str(importlib.resources.files("llamajax"))) / "configs"
    return installed if installed.is_dir() else installed.parent.parent / "configs"


def preset_names() -> list[str]:
    """Names that `preset` knows, sorted."""
    return sorted(path.stem for path in preset_folder().glob("*.toml"))


def preset(name: str) -> Config:
    """The architecture of a published LLaMA, for example `preset("llama3.2-1b")`; no weights.

    Raises:
        LlamaJaxError: for a name that is not in `preset_names()`.
    """
    if name not in preset_names():
        raise LlamaJaxError(f"no preset is called {name!r}: expected one of {', '.join(preset_names())}")
    path = preset_folder() / f"{name}.toml"
    return Config.from_dict(read_toml(path), str(path))
