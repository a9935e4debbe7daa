"""Converts between a Hugging Face folder's settings for text (config, generation config, tokenizer files) and `Words`.

Where files disagree, the order is that of transformers: generation_config.json goes before config.json, and
tokenizer_config.json before special_tokens_map.json and added_tokens.json. A note names each setting that is ignored.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamajax.errors import LlamaJaxError
from llamajax.files import parse_json, read_bytes, shortened
from llamajax.tokenizer import LARGEST_TOKENIZER, Tokenizer, file_name, is_sentencepiece
from llamajax.words import CARRIED_FILES, SAMPLING, AddedToken, Words, is_carried, sampling_in_range

# Settings of generation_config.json that are not supported, with the values at which they have no effect.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "diversity_penalty": (0.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0.0,),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": (),
    "typical_p": (1.0,),
    "watermarking_config": (),
}
_MODEL, _JSON = "tokenizer.model", "tokenizer.json"
# The folder in which transformers keeps chat templates beside the default one.
_TEMPLATES = "additional_chat_templates"
_MOST_TEMPLATES = 100
_NAMED_TEMPLATE = re.compile(r"chat_template\.(.+)\.jinja")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_words(path: Path, config: dict[str, Any], vocab_size: int) -> tuple[Words, tuple[str, ...]]:
    """Reads a folder's settings for text.

    Args:
        path: the folder.
        config: its config.json.
        vocab_size: V, the number of ids that the model has embeddings for.

    Returns:
        The words, and a note on each setting of the files that is not followed.

    Raises:
        LlamaJaxError: for a file that is not JSON, or a value that is not of the expected type.
    """
    here = [name for name in CARRIED_FILES if name != _MODEL and os.path.lexists(path / name)]
    files = {name: read_bytes(path / name) for name in here} | _named_templates(path)
    notes: list[str] = []
    generation = _object(files, "generation_config.json", path)
    # transformers reads generation settings from config.json only if there is no generation_config.json.
    asked = (path / "generation_config.json", generation) if generation else (path / "config.json", config)
    tokenizer, special_map = (
        _object(files, f"{name}.json", path) for name in ("tokenizer_config", "special_tokens_map")
    )
    names = {name: _content(tokenizer.get(name, special_map.get(name)), path, name) for name in _NAMED}
    try:
        words = Words(
            bos_id=_id(path, "bos_token_id", generation, config, vocab_size, notes),
            stop_ids=_ids(path, "eos_token_id", generation, config, vocab_size, notes),
            pad_id=_id(path, "pad_token_id", generation, config, vocab_size, notes),
            bos_token=names["bos_token"],
            eos_token=names["eos_token"],
            # If the tokenizer's BOS is null, texts begin without one.
            add_bos=False if tokenizer.get("bos_token", "") is None else tokenizer.get("add_bos_token"),
            add_eos=tokenizer.get("add_eos_token"),
            space=_space(tokenizer),
            added=_added_tokens(files, tokenizer, special_map, names, path, vocab_size, notes),
            sampling=_sampling(*asked, notes),
            files=files,
        )
    except LlamaJaxError as error:
        raise LlamaJaxError(f"{path}: {error}") from None
    return _with_tokenizers_end(words, path, vocab_size, notes), tuple(notes)


def choose_tokenizer(path: Path, words: Words) -> tuple[bytes | None, Words]:
    """Returns the tokenizer file that transformers would use, and the words that go with it.

    This is tokenizer.json, except for the class LlamaTokenizer: it takes only pieces and merges from tokenizer.json and
    has its own rules for spaces, which `Words.space` holds and which apply to a sentencepiece model.

    Args:
        path: the folder.
        words: the result of `read_words`; of two tokenizer files, the one that is not used stays among their files.
    """
    model = None
    if os.path.lexists(path / _MODEL):
        model = read_bytes(path / _MODEL, LARGEST_TOKENIZER)
    value = words.files.get(_JSON)
    name = _object(words.files, "tokenizer_config.json", path).get("tokenizer_class")
    is_llama = name is None or (isinstance(name, str) and name.removesuffix("Fast") == "LlamaTokenizer")
    holds_tokenizer = value is not None and b'"model"' in value
    if model is not None and not (holds_tokenizer and not (is_llama and is_sentencepiece(model))):
        return model, words
    if value is None:
        return None, words
    files = {file: data for file, data in words.files.items() if file != _JSON}
    files |= {} if model is None else {_MODEL: model}
    return value, dataclasses.replace(words, files=files, space=(words.space or "first") if is_llama else None)


def _with_tokenizers_end(words: Words, path: Path, vocab_size: int, notes: list[str]) -> Words:
    """Stops at the tokenizer's end if no config lists stop ids; adds a note if the configs list other ids only."""
    end = next((token.id for token in words.added if token.text == words.eos_token), None)
    if end is None or end in (words.stop_ids or ()):
        return words
    if words.stop_ids is None:
        return dataclasses.replace(words, stop_ids=(end,))
    listed = ", ".join(map(str, words.stop_ids))
    notes.append(
        f"{path}: the tokenizer's end, {shortened(words.eos_token)} ({end}), is not among the eos_token_id of the "
        f"configs ({listed}), at which alone generation ends"
    )
    return words


def _named_templates(path: Path) -> dict[str, bytes]:
    """Reads the folder's chat templates beside the default one, by the names that `Words` uses."""
    folder = path / _TEMPLATES
    found = sorted(folder.glob("*.jinja"))[:_MOST_TEMPLATES] if folder.is_dir() else []
    files = {f"chat_template.{file.stem}.jinja": file for file in found}
    return {name: read_bytes(file) for name, file in files.items() if is_carried(name)}


def _object(files: Mapping[str, bytes], name: str, path: Path) -> dict[str, Any]:
    """Parses one of the files as a JSON object; empty if there is no such file."""
    value = parse_json(files[name], str(path / name)) if name in files else {}
    if not isinstance(value, dict):
        raise LlamaJaxError(f"{path / name}: expected a JSON object, got {type(value).__name__}")
    return value


def _content(token: Any, path: Path, name: str) -> str | None:
    """Returns the text of a token that is written as text or as an object of its settings; None for an empty text."""
    text = token.get("content") if isinstance(token, Mapping) else token
    if text is not None and not isinstance(text, str):
        raise LlamaJaxError(f"{path}: {name} is {shortened(token)}: expected a text, or an object with its content")
    return text or None


def _ids(
    path: Path,
    key: str,
    generation: Mapping[str, Any],
    config: Mapping[str, Any],
    vocab_size: int,
    notes: list[str],
) -> tuple[int, ...] | None:
    """Returns the ids under a key of generation_config.json, else of config.json; None if neither has any."""
    file, value = next(
        (
            (name, said)
            for name, said in (("generation_config.json", generation.get(key)), ("config.json", config.get(key)))
            if said is not None
        ),
        ("", None),
    )
    if value is None:
        return None
    listed = value if isinstance(value, list) else [value]
    if any(isinstance(index, bool) or not isinstance(index, int) for index in listed):
        raise LlamaJaxError(f"{file}: {key} is {shortened(value)}: expected a token's id, or a list of them")
    outside = [index for index in listed if not 0 <= index < vocab_size]
    if outside and key != "pad_token_id":  # -1 there is an old way to say "none"
        notes.append(f"{path / file}: {key} {shortened(outside[0])} is no id of the model's {vocab_size}: ignored")
    return tuple(dict.fromkeys(index for index in listed if 0 <= index < vocab_size)) or None


def _id(path: Path, key: str, generation: Any, config: Any, vocab_size: int, notes: list[str]) -> int | None:
    ids = _ids(path, key, generation, config, vocab_size, notes)
    return ids[0] if ids else None


def _space(tokenizer: Mapping[str, Any]) -> str | None:
    """Returns where a space is put before text, by transformers' `add_prefix_space` and `legacy`."""
    if tokenizer.get("add_prefix_space") is False:
        return "never"
    return "always" if tokenizer.get("legacy") is True else None


def _added_tokens(
    files: Mapping[str, bytes],
    tokenizer: Mapping[str, Any],
    special_map: Mapping[str, Any],
    names: Mapping[str, str | None],
    path: Path,
    vocab_size: int,
    notes: list[str],
) -> tuple[AddedToken, ...]:
    """Returns added tokens, sorted by id. Tokens with a role (BOS, …) or listed as special elsewhere are special."""
    special = {text for text in names.values() if text}
    for source in (tokenizer, special_map):
        more = source.get("additional_special_tokens") or source.get("extra_special_tokens") or []
        for token in more.values() if isinstance(more, Mapping) else more if isinstance(more, list) else []:
            special.add(_content(token, path, "a special token") or "")
    tokens = []
    for index, settings in _listed_tokens(files, tokenizer, path):
        flags = {flag: settings[flag] for flag in _FLAGS if settings.get(flag) is not None}
        text = _content(settings, path, f"added token {index}") or ""
        flags["special"] = flags.get("special", False) or text in special
        flags.setdefault("normalized", not flags["special"])
        token = AddedToken(id=index, text=text, **flags)
        if index < vocab_size:
            tokens.append(token)
        else:
            notes.append(
                f"{path}: added token {shortened(text)} has id {index}, but the model has {vocab_size} embeddings: "
                "ignored"
            )
    return tuple(sorted(tokens, key=lambda token: token.id))


def _listed_tokens(
    files: Mapping[str, bytes], tokenizer: Mapping[str, Any], path: Path
) -> list[tuple[int, Mapping[str, Any]]]:
    """Returns id and settings of each token in `added_tokens_decoder` and added_tokens.json, else in tokenizer.json."""
    decoder = tokenizer.get("added_tokens_decoder")
    if isinstance(decoder, Mapping) and all(
        index.isascii() and index.isdigit() and len(index) < 10 and isinstance(settings, Mapping)
        for index, settings in decoder.items()
    ):
        listed = {int(index): settings for index, settings in decoder.items()}
    elif decoder is not None:
        raise LlamaJaxError(f"added_tokens_decoder is {shortened(decoder)}: expected ids, each with its settings")
    else:
        listed = {}
    texts = {settings.get("content") for settings in listed.values() if isinstance(settings.get("content"), str)}
    for text, index in _object(files, "added_tokens.json", path).items():
        if not isinstance(index, int):
            raise LlamaJaxError(f"added_tokens.json: {shortened(text)} is {shortened(index)}: expected its id")
        if text not in texts:
            listed.setdefault(index, {"content": text})
    if not listed and "added_tokens.json" not in files and decoder is None:
        entries = _object(files, "tokenizer.json", path).get("added_tokens") or []
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise LlamaJaxError("added_tokens of tokenizer.json: expected a list of objects")
        return [(entry.get("id", -1), entry) for entry in entries]
    return list(listed.items())


def _sampling(file: Path, asked: dict[str, Any], notes: list[str]) -> dict[str, float]:
    """Returns a file's defaults for our sampling parameters; `do_sample: false` means greedy decoding."""
    sampling: dict[str, float] = {}
    greedy = {"temperature": 0} if asked.get("do_sample") is False else {}
    for name in SAMPLING:
        value = (asked | greedy).get(name)
        if value is None or (name in ("top_k", "min_p") and value == 0):  # in transformers, 0 means off
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        finite = isinstance(value, float) and math.isfinite(value)
        if not (whole or (finite and name != "top_k")) or not sampling_in_range(name, value):
            notes.append(f"{file}: {name} is {shortened(value)}, which is invalid: ignored")
            continue
        sampling[name] = value
    notes += [
        f"{file}: {name} is {shortened(asked[name])}, which is not supported: ignored"
        for name, neutral in _NOT_DONE.items()
        if asked.get(name) not in (None, *neutral, [], {})
    ]
    return sampling


# ---- Writing --------------------------------------------------------------------------------------------------------


def config_ids(words: Words, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns the special ids for config.json; keys without a known id are left out."""
    stops = words.stop_ids
    bos_id = words.bos_id
    if tokenizer is not None:
        # The end of text comes first: readers that take only one id take the first.
        stops = (
            tuple(sorted(tokenizer.stop_ids, key=lambda index: index != tokenizer.eos_id)) if stops is None else stops
        )
        bos_id = tokenizer.bos_id if bos_id is None else bos_id
    ids: dict[str, Any] = {"bos_token_id": bos_id, "eos_token_id": list(stops or ()), "pad_token_id": words.pad_id}
    if len(ids["eos_token_id"]) == 1:
        (ids["eos_token_id"],) = ids["eos_token_id"]
    return {key: value for key, value in ids.items() if value not in (None, [])}


def write_words(path: Path, words: Words, tokenizer_bytes: bytes | None, tokenizer: Tokenizer | None) -> None:
    """Writes the files beside config.json: those that came with the source, generated ones for others, the tokenizer.

    Args:
        path: the folder.
        words: the settings for text.
        tokenizer_bytes: written as tokenizer.json or tokenizer.model.
        tokenizer: the tokenizer in these bytes, if they can be read.
    """
    files = _word_files(words, tokenizer) | (
        {} if tokenizer_bytes is None else {file_name(tokenizer_bytes): tokenizer_bytes}
    )
    for name, data in files.items():
        file = path / name
        if named := _NAMED_TEMPLATE.fullmatch(name):
            file = path / _TEMPLATES / f"{named[1]}.jinja"
            file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)


def _word_files(words: Words, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """Returns the files that came with the source; makes generation_config.json and tokenizer_config.json if absent."""
    files = dict(words.files)
    if "generation_config.json" not in files:
        generation = config_ids(words, tokenizer) | dict(words.sampling)
        if words.sampling:
            generation["do_sample"] = generation.get("temperature") != 0
            if not generation["do_sample"]:
                del generation["temperature"]
        if generation:
            files["generation_config.json"] = _json(generation)
    if tokenizer is not None and "tokenizer_config.json" not in files:
        files["tokenizer_config.json"] = _json(_tokenizer_config(tokenizer))
    return files


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    words = tokenizer.words
    name = lambda index: None if index is None else tokenizer.piece(index)  # noqa: E731
    is_model = tokenizer.form == "sentencepiece"
    spaces = {"add_prefix_space": tokenizer.drops_first_space, "legacy": words.space == "always"}
    return {
        "tokenizer_class": "LlamaTokenizer" if is_model else "PreTrainedTokenizerFast",
        "bos_token": name(tokenizer.bos_id),
        "eos_token": name(tokenizer.eos_id),
        "unk_token": name(tokenizer.unk_id),
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": tokenizer.add_eos,
        **(spaces if is_model or words.space else {}),
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(token.id): {"content": token.text, **{flag: getattr(token, flag) for flag in _FLAGS}}
            for token in tokenizer.added
        },
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
