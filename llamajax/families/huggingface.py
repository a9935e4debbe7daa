"""Converts Hugging Face's config.json to a `Config` and back; this module handles the keys that all families share.

Every key is either read, or known to have no effect on the forward pass, or causes an error that names it.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llamajax.config import MOST_LAYERS, Activation, Config, LayerKind
from llamajax.errors import LlamaJaxError
from llamajax.families.family import Keys, check_read, family_of, format_of
from llamajax.families.huggingface_quantization import read_quantization
from llamajax.families.huggingface_rope import read_rope, write_rope
from llamajax.fields import LARGEST_DIMENSION
from llamajax.files import shortened

# Our field for each key that all families have. The first group has no defaults.
_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "ffn_width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
_OPTIONAL = {
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_size",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_embeddings",
}
_NAMES = _REQUIRED | _OPTIONAL
_ROPE_KEYS = frozenset(
    "rope_theta rope_scaling rope_parameters rope_local_base_freq original_max_position_embeddings".split()
)

# Keys that have no effect on the forward pass, whatever their value: provenance, training, and settings of the
# tokenizer, which `checkpoint.huggingface_words` reads.
_NO_EFFECT = frozenset(
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
_GENERATION = frozenset(
    "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
    "epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id "
    "length_penalty max_length max_new_tokens min_length min_new_tokens min_p no_repeat_ngram_size num_beam_groups "
    "num_beams num_return_sequences output_scores penalty_alpha remove_invalid_values renormalize_logits "
    "repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p".split()
)
# Keys of training frameworks, of versions, and of dropout, which inference does not use.
_NO_EFFECT_PATTERN = re.compile(r"unsloth_\w+|\w+_version|\w*dropout\w*|\w+_pdrop")


# Keys that could change the forward pass, with the values that have no effect; families that support them read them.
_ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "bias": (False,),
    "qkv_bias": (False,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0, 1),
    "pruned_heads": ({},),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "tie_encoder_decoder": (False,),
}

# Our names by the names of functions in transformers' `activations.py`; the first name of each function is written.
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu2": "relu_squared",
}
# Models that also read images. Their config holds the text model's config as an object, which has this `model_type`
# unless it names another.
_WITH_IMAGES = {"gemma3": "gemma3_text", "mistral3": "mistral"}
# Their other keys, about images, training and the tokenizer.
_OF_IMAGES = frozenset(
    "text_config vision_config boi_token_index eoi_token_index image_token_index image_token_id boi_token_id "
    "eoi_token_id mm_tokens_per_image projector_hidden_act multimodal_projector_bias spatial_merge_size "
    "vision_feature_layer vision_feature_select_strategy".split()
)
LAYER_TYPES: Mapping[str, LayerKind] = {
    "full_attention": "full",
    "sliding_attention": "window",
    "chunked_attention": "chunk",
}


def config_from_hf(fields: Mapping[str, Any], source: str = "config.json", ignore_keys: Collection[str] = ()) -> Config:
    """Reads the `config.json` of a model of a supported family.

    Missing and null keys get the defaults of the family's class in transformers. Both spellings of RoPE are read:
    `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (5).

    Args:
        fields: the JSON object.
        source: the beginning of error messages.
        ignore_keys: keys to skip: unknown ones that do not change the forward pass.

    Raises:
        LlamaJaxError: for a key that is neither read nor known to be without effect, or a value that asks for something
            unsupported. No key is dropped silently.
    """
    if not isinstance(fields, Mapping):
        raise LlamaJaxError(f"{source}: expected a JSON object, got {type(fields).__name__}")
    needed = sorted(set(ignore_keys) & ({"model_type", *_NAMES} | _ROPE_KEYS))
    if needed:
        raise LlamaJaxError(f"{needed[0]!r} cannot be ignored: the architecture depends on it")
    fields = _of_text({key: value for key, value in fields.items() if key not in ignore_keys}, source)
    family = family_of(fields.get("model_type"), "huggingface", f"{source}: model_type")
    form = family.huggingface
    assert form is not None  # `family_of` knows no others
    keys = Keys(fields, source, {**form.defaults, **form.copies.get(fields["model_type"], {})})
    ours = _sizes(keys)
    ours |= form.read(keys)
    if "activation" not in ours:
        ours["activation"] = keys.choice("hidden_act", ACTIVATIONS)
    ours |= read_rope(keys, ours["context_length"], form, ours.get("layer_kinds", Config.layer_kinds))
    read_quantization(keys.take("quantization_config", None), source)  # only checked here; the file reader uses it
    for key, allowed in _ONLY_VALUE.items():
        if key not in keys.read:
            keys.only(key, *allowed)
    remedy = (
        "if it does not change the forward pass, give --ignore_key={key} (ignore_keys in the library), or remove it "
        f"(read: {', '.join(sorted(keys.read))})"
    )
    check_read(keys, fields, _is_without_effect, remedy)
    return Config.from_dict(ours | {"family": family.name}, source)


def _of_text(fields: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The keys of the text model, if the model also reads images; otherwise all keys of config.json."""
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in _WITH_IMAGES:
        return fields
    text = fields.get("text_config")
    if not isinstance(text, Mapping):
        raise LlamaJaxError(
            f"{source}: text_config is {shortened(text)}: expected an object, as in models of type {kind!r}"
        )
    outside = {key: value for key, value in fields.items() if key not in _OF_IMAGES and key != "model_type"}
    # The head belongs to the whole model, so its key decides whether the head is tied.
    tied = {key: value for key, value in outside.items() if key == "tie_word_embeddings" and value is not None}
    return {"model_type": _WITH_IMAGES[kind], **outside, **text, **tied}


def _sizes(keys: Keys) -> dict[str, Any]:
    """Reads the sizes and other fields that every family's config.json has."""
    keys.read.add("model_type")
    missing = [key for key in _REQUIRED if keys.take(key, None) is None]
    if missing:
        raise LlamaJaxError(f"{keys.source}: missing key {missing[0]!r}: expected {', '.join(_REQUIRED)}")
    most = {"num_hidden_layers": MOST_LAYERS}
    ours: dict[str, Any] = {name: keys.whole(key, most.get(key, LARGEST_DIMENSION)) for key, name in _REQUIRED.items()}
    heads, said = keys.whole_or_null("num_key_value_heads"), keys.whole_or_null("head_dim")
    ours["num_kv_heads"] = ours["num_heads"] if heads is None else heads
    ours["head_size"] = ours["width"] // ours["num_heads"] if said is None else said
    ours["context_length"] = keys.whole("max_position_embeddings")
    ours["norm_eps"] = keys.number("rms_norm_eps", low=0.0)
    ours["tied_embeddings"] = keys.flag("tie_word_embeddings")
    return ours


def _is_without_effect(key: str) -> bool:
    """Whether a key of config.json is known to have no effect on the forward pass."""
    return key in _NO_EFFECT | _GENERATION or bool(_NO_EFFECT_PATTERN.fullmatch(key))


def pattern_of(kinds: list[LayerKind]) -> tuple[LayerKind, ...]:
    """The shortest pattern that, repeated and cut, gives the kinds of all layers."""
    for size in range(1, len(kinds) + 1):
        if all(kind == kinds[number % size] for number, kind in enumerate(kinds)):
            return tuple(kinds[:size])
    return ("full",)


def read_layer_types(keys: Keys, default: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """Returns the shortest pattern of `layer_types`, or of the family's default, which repeats.

    Raises:
        LlamaJaxError: if the number of kinds is not the number of layers, or a kind is unknown.
    """
    said = keys.take("layer_types", None)
    if said is None:
        layers = keys.take("num_hidden_layers")
        return pattern_of([default[layer % len(default)] for layer in range(layers)])
    layers = keys.take("num_hidden_layers")
    if not isinstance(said, list) or len(said) != layers:
        raise LlamaJaxError(f"{keys.source}: layer_types is {shortened(said)}: expected a list of {layers} kinds")
    for kind in said:
        if not isinstance(kind, str) or kind not in LAYER_TYPES:
            raise LlamaJaxError(
                f"{keys.source}: layer_types has {shortened(kind)}, which is not supported: expected "
                f"{', '.join(LAYER_TYPES)}"
            )
    return pattern_of([LAYER_TYPES[kind] for kind in said])


def read_windows(keys: Keys, default: Sequence[LayerKind], window: Any) -> dict[str, Any]:
    """Reads the kinds of the layers, and the window of those that have one.

    Args:
        keys: the keys of config.json.
        default: the pattern of kinds if there is no `layer_types`.
        window: the value of `sliding_window`; None if there is no window.
    """
    kinds = read_layer_types(keys, default)
    if "window" in kinds and window is None:
        raise LlamaJaxError(f"{keys.source}: layer_types has sliding_attention: expected a sliding_window, not null")
    return {"layer_kinds": kinds, "window": window if "window" in kinds else None}


def read_window_of_all(keys: Keys) -> dict[str, Any]:
    """Reads the window of all layers; None also for one that covers the whole context, because it hides nothing."""
    window = keys.whole_or_null("sliding_window")
    if window is None or window >= keys.whole("max_position_embeddings"):
        return {"layer_kinds": ("full",), "window": None}
    return {"layer_kinds": ("window",), "window": window}


def write_layer_types(config: Config) -> list[str]:
    """The value of `layer_types`: the kind of each layer."""
    named = {ours: theirs for theirs, ours in LAYER_TYPES.items()} | {"nope": "full_attention"}
    return [named[config.kind(layer)] for layer in range(config.num_layers)]


def config_to_hf(config: Config) -> dict[str, Any]:
    """Returns the `config.json` that transformers reads as the same model (inverse of `config_from_hf`).

    Raises:
        LlamaJaxError: if the family has no config.json, or its config.json cannot express one of the config's switches.
    """
    form = format_of(config, "huggingface")
    fields: dict[str, Any] = {key: getattr(config, ours) for key, ours in _NAMES.items()}
    fields |= {"model_type": form.kinds[0], "architectures": [form.architecture]}
    # The ids of special tokens are unknown here; null keeps transformers from using the defaults of the family's class.
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    fields["hidden_act"] = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
    fields |= form.write(config)
    fields |= write_rope(config, form, fields.pop("rope_scaling", {}))
    read = config_from_hf(fields)
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(read, field.name)
        if ours != theirs:
            raise LlamaJaxError(
                f"{field.name} is {shortened(ours)}: a config.json of family {config.family!r} can only "
                f"express {shortened(theirs)}: expected a config of that family"
            )
    return fields
