"""`Words`: a checkpoint's token ids, added tokens and sampling defaults, beside its weights and tokenizer pieces.

Every format stores a part of them in its own way: a Hugging Face folder in five files, llamajax's checkpoint in its
manifest, a llama2.c file not at all. Each reader fills in a `Words`, each writer writes it; `Tokenizer`, and through it
generation, evaluation and export, follow it. For a field that is None or empty, the tokenizer's own value applies.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from llamajax.errors import LlamaJaxError
from llamajax.files import parse_json, shortened

# The sampling parameters of `sampling.Sampler` for which a checkpoint may have defaults.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Where a space is put before text that begins without one: "first" before the whole text only, "always" also before
# each part between added tokens.
SPACES = ("first", "always", "never")
# Files that belong to one tokenizer, and do not apply to another.
_TOKENIZER_FILES = frozenset(
    "added_tokens.json chat_template.jinja chat_template.json special_tokens_map.json tokenizer.json tokenizer.model "
    "tokenizer_config.json".split()
)
# Files that a checkpoint's folder may carry along.
CARRIED_FILES = tuple(sorted({"generation_config.json", *_TOKENIZER_FILES}))
CHAT_TEMPLATE = "chat_template.jinja"
_NAMED_TEMPLATE = re.compile(r"chat_template\.([A-Za-z0-9_-]{1,40})\.jinja")
_LARGEST_ID = 1 << 27


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token that a checkpoint adds to its tokenizer's pieces, or names among them: always one id in a text.

    Attributes:
        id: its id.
        text: its text.
        special: whether it has no text of its own when ids are decoded.
        lstrip: whether white space before it belongs to it when text is encoded.
        rstrip: whether white space after it belongs to it.
        single_word: whether it is recognised only if no letter, digit or underscore touches it.
        normalized: whether it is searched in the normalized text, after the tokens that are searched in the raw text.
    """

    id: int
    text: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    def __post_init__(self):
        """Refuses invalid values."""
        _check_id("added token", self.id)
        _check_text(f"added token {self.id}", self.text)
        for name in ("special", "lstrip", "rstrip", "single_word", "normalized"):
            _check_bool(f"{name} of added token {self.id}", getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """The token ids, added tokens and sampling defaults of a checkpoint.

    Attributes:
        bos_id: the id at the beginning of the model's training texts.
        stop_ids: the ids at which generation ends; if given, only these.
        pad_id: the id for padding; stored, not used.
        bos_token: text of the token that `Tokenizer.encode` begins with.
        eos_token: text of the token that `Tokenizer.encode` ends with if `add_eos` is true.
        add_bos: whether `Tokenizer.encode` begins with a BOS token (by default yes).
        add_eos: whether `Tokenizer.encode` ends with an EOS token (by default no).
        space: where a space is added before text: one of `SPACES` (by default "first").
        added: tokens in addition to the tokenizer's pieces, by id.
        sampling: defaults for the parameters named in `SAMPLING`; temperature 0 means greedy decoding.
        files: files of the source by name (`is_carried`), unchanged.

    Raises:
        LlamaJaxError: for a value of another type, or ids that no vocabulary has.
    """

    bos_id: int | None = None
    stop_ids: tuple[int, ...] | None = None
    pad_id: int | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    space: str | None = None
    added: tuple[AddedToken, ...] = ()
    sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        """Refuses values that no checkpoint can have."""
        for name in ("bos_id", "pad_id"):
            if getattr(self, name) is not None:
                _check_id(name, getattr(self, name))
        for stop in self.stop_ids or ():
            _check_id("stop id", stop)
        for name in ("bos_token", "eos_token"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        for name in ("add_bos", "add_eos"):
            if getattr(self, name) is not None:
                _check_bool(name, getattr(self, name))
        if self.space not in (None, *SPACES):
            raise LlamaJaxError(f"space is {shortened(self.space)}: expected one of {', '.join(SPACES)}")
        if len({token.id for token in self.added}) < len(self.added):
            raise LlamaJaxError("added tokens share an id: expected each id once")
        for name, value in self.sampling.items():
            if name not in SAMPLING or isinstance(value, bool) or not isinstance(value, int | float):
                raise LlamaJaxError(
                    f"sampling has {name}={shortened(value)}: expected numbers for {', '.join(SAMPLING)}"
                )
        unknown = sorted(name for name in self.files if not is_carried(name))
        if unknown:
            raise LlamaJaxError(f"file {shortened(unknown[0])}: expected one of {', '.join(CARRIED_FILES)}")

    @functools.cached_property
    def chat_templates(self) -> Mapping[str, str]:
        """The chat templates by name, "default" first: from template files, else from a file of the tokenizer.

        Raises:
            LlamaJaxError: for a file that is not JSON.
        """
        found = {
            (named[1] if (named := _NAMED_TEMPLATE.fullmatch(name)) else "default"): data.decode("utf-8", "replace")
            for name, data in self.files.items()
            if name == CHAT_TEMPLATE or _NAMED_TEMPLATE.fullmatch(name)
        }
        for name in ("tokenizer_config.json", "chat_template.json"):
            value = parse_json(self.files[name], name) if name in self.files and not found else {}
            said = value.get("chat_template") if isinstance(value, Mapping) else None
            each = [{"name": "default", "template": said}] if isinstance(said, str) else said
            each = each if isinstance(each, list) else []
            pairs = [(one.get("name"), one.get("template")) for one in each if isinstance(one, Mapping)]
            found |= {key: text for key, text in pairs if isinstance(key, str) and isinstance(text, str)}
        return {name: found[name] for name in sorted(found, key=lambda name: (name != "default", name))}

    def for_another_tokenizer(self) -> "Words":
        """Returns the same words without the files that belong to the original tokenizer."""
        files = {name: data for name, data in self.files.items() if name == "generation_config.json"}
        return dataclasses.replace(self, files=files)

    def to_dict(self) -> dict[str, Any]:
        """Returns the given fields as plain JSON values, with files as SHA-256; `from_dict` reads them back."""
        said = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        said = {name: value for name, value in said.items() if value is not None and value not in ((), {})}
        if self.stop_ids is not None:
            said["stop_ids"] = list(self.stop_ids)
        if self.added:
            said["added"] = [dataclasses.asdict(token) for token in self.added]
        if self.files:
            said["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(self.files.items())}
        return said

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], files: Mapping[str, bytes]) -> "Words":
        """Builds the words from `to_dict`'s form and the files.

        Raises:
            LlamaJaxError: for values that `to_dict` does not write, or files of another SHA-256.
        """
        try:
            fields = dict(fields)
            digests = dict(fields.pop("files", {}))
            if fields.get("stop_ids") is not None:
                fields["stop_ids"] = tuple(fields["stop_ids"])
            fields["added"] = tuple(AddedToken(**token) for token in fields.get("added", ()))
            words = cls(**fields, files=files)
            found = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise LlamaJaxError(f"words: {str(error)[:200]}: expected the fields of a checkpoint's words") from None
        if found != digests:
            raise LlamaJaxError("words: the files are not those of the manifest (SHA-256 differs)")
        return words


def is_carried(name: str) -> bool:
    """Whether a file of this name may be among the files of `Words`: `CARRIED_FILES`, and chat templates by name."""
    return name in CARRIED_FILES or _NAMED_TEMPLATE.fullmatch(name) is not None


def sampling_in_range(name: str, value: float) -> bool:
    """Whether `sampling.make_sampler` accepts the value; that function reports invalid values of users."""
    if name == "temperature":
        return value == 0 or 1e-4 <= value < 1e30
    if name == "top_k":
        return 1 <= value <= 1 << 30
    return 0 < value <= (1 if name in ("top_p", "min_p") else 1e30)


def _check_text(name: str, value: Any) -> None:
    # JSON can hold single surrogates, halves of a character, which are no valid text.
    if not isinstance(value, str) or not value or any("\ud800" <= character <= "\udfff" for character in value):
        raise LlamaJaxError(f"{name} is {shortened(value)}: expected a text")


def _check_id(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _LARGEST_ID:
        raise LlamaJaxError(f"{name} is {shortened(value)}: expected a whole number from 0 to {_LARGEST_ID - 1}")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise LlamaJaxError(f"{name} is {shortened(value)}: expected true or false")
