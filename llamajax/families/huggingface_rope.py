"""Reads and writes RoPE in Hugging Face's config.json, in the spellings of transformers 4 and 5.

Reference: transformers' `modeling_rope_utils.py`, and `convert_rope_params_to_dict` of a family's config class.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.families.family import Format, Keys
from llamajax.fields import check_whole
from llamajax.files import shortened
from llamajax.rope import Rope, RopeScaling

# For each kind of scaling, transformers' names of its parameters, and ours.
_ORIGINAL = "original_max_position_embeddings"
_NAMES: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        _ORIGINAL: "original_context_length",
    },
    "yarn": {
        "factor": "factor",
        _ORIGINAL: "original_context_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
    "longrope": {
        "factor": "factor",
        _ORIGINAL: "original_context_length",
        "attention_factor": "attention_factor",
        "short_factor": "short_factors",
        "long_factor": "long_factors",
    },
}
_REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}
# Names without effect for a kind of scaling: transformers ignores them, but writes some, or published files have them.
_IGNORED: dict[str, frozenset[str]] = {
    "default": frozenset(name for names in _NAMES.values() for name in names),
    "linear": frozenset({_ORIGINAL}),
    "dynamic": frozenset({_ORIGINAL}),
    "yarn": frozenset({"finetuned"}),
}
_OWN = "rope."  # the prefix under which `rope_value` records names in `Keys.read`
_SPELLINGS = ("rope_scaling", "rope_parameters")
_FULL, _WINDOW = "full_attention", "sliding_attention"
_LOCAL_THETA = "rope_local_base_freq"


def read_rope(keys: Keys, context_length: Any, form: Format, kinds: Sequence[str]) -> dict[str, Any]:
    """Reads the fields of `Config` about RoPE from either spelling; if a file has both, they must agree.

    Args:
        keys: the keys of the file.
        context_length: the model's context, which replaces a missing original context.
        form: the family's format, for `partial_rope` and `window_rope`.
        kinds: the kinds of the layers.

    Raises:
        LlamaJaxError: for an unknown scaling, or a scaling with missing or unknown parameters.
    """
    outside: dict[str, Any] = {"rope_theta": keys.number("rope_theta", Config.rope_theta, low=1.0)}
    if form.partial_rope:
        outside["partial_rotary_factor"] = keys.number("partial_rotary_factor", 1.0, low=0.0, above=True)
    local = {"rope_theta": keys.number(_LOCAL_THETA, outside["rope_theta"], low=1.0)} if form.window_rope else {}
    # If all layers are alike, an original length outside the object takes precedence in transformers.
    original = None if form.window_rope else keys.take(_ORIGINAL, None)
    read = []
    for key, value in _objects(keys) or [("rope_parameters", {})]:
        reader = _Reader(f"{keys.source}: {key}", context_length, original, _own(keys))
        full, window = reader.parts(value, nested=form.window_rope and key == "rope_parameters")
        both = reader.rope(full, outside)
        other = reader.rope(window, outside | local) if form.window_rope else both
        if both["rope_fraction"] != other["rope_fraction"]:
            raise LlamaJaxError(
                f"{reader.source}: partial_rotary_factor differs by kind of layer: expected one value for all layers"
            )
        same = "window" not in kinds or both == other
        own = None if same else {"theta": other["rope_theta"], "scaling": other["rope_scaling"]}
        read.append(both | {"window_rope": own})
    if read[0] != read[-1]:
        raise LlamaJaxError(f"{keys.source}: rope_scaling and rope_parameters differ: expected one of them")
    return read[0]


def rope_value(keys: Keys, name: str, own: bool = True) -> Any:
    """A value in the object of RoPE parameters, or None; `own` marks a name that only this family has there."""
    if own:
        keys.read.add(_OWN + name)
    said = [value.get(name) for _, value in _objects(keys) if isinstance(value, Mapping)]
    return next((value for value in said if value is not None), None)


def _objects(keys: Keys) -> list[tuple[str, Any]]:
    """The objects of RoPE parameters in the file, each with its key; if there are none, the family's defaults."""
    said = [(key, keys.take(key, None)) for key in _SPELLINGS]
    found = [(key, value) for key, value in said if key in keys]
    return found or [(key, value) for key, value in said if value is not None]


def _own(keys: Keys) -> frozenset[str]:
    """The family's own names that `rope_value` was asked for."""
    return frozenset(name.removeprefix(_OWN) for name in keys.read if name.startswith(_OWN))


class _Reader(NamedTuple):
    """Reads objects of RoPE parameters.

    Attributes:
        source: the beginning of error messages.
        context_length: the model's context.
        original: the original context from a key outside the object, or None.
        own: names that belong to the family, which reads them itself.
    """

    source: str
    context_length: Any
    original: Any
    own: frozenset[str]

    def parts(self, value: Any, nested: bool) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The objects of full layers and of layers with windows; the latter is empty if one object is for all layers.

        Args:
            value: the value of the key.
            nested: whether there is one object for each kind of layer.
        """
        if not isinstance(value, Mapping):
            raise LlamaJaxError(f"{self.source} is {shortened(value)}: expected an object")
        if not nested and value and all(isinstance(part, Mapping) for part in value.values()):
            raise LlamaJaxError(
                f"{self.source} differs by kind of layer ({shortened(sorted(map(str, value)))}), which this family "
                "does not support: expected one rope_type and its values"
            )
        if not nested:
            return value, {}
        for name, part in value.items():
            if name not in (_FULL, _WINDOW) or not isinstance(part, Mapping | None):
                raise LlamaJaxError(
                    f"{self.source}: {shortened(name)} is {shortened(part)}: expected {_FULL} and {_WINDOW}, each an "
                    "object"
                )
        return value.get(_FULL) or {}, value.get(_WINDOW) or {}

    def rope(self, value: Mapping[str, Any], outside: Mapping[str, Any]) -> dict[str, Any]:
        """Reads theta, scaling and fraction from one object, as transformers 5 does.

        Args:
            value: the object.
            outside: values for names that the object does not have.
        """
        said = {key: part for key, part in value.items() if part is not None and key not in self.own}
        outside = dict(outside) | {name: said.pop(name) for name in outside if name in said}
        if said.get("partial_rotary_factor") == 1:
            del said["partial_rotary_factor"]
        kind = self._kind(said)
        scaling = None if kind == "default" else self._scaling(kind, said)
        if kind == "default":
            self._check_names(kind, said)
        return {
            "rope_theta": outside["rope_theta"],
            "rope_scaling": scaling,
            "rope_fraction": outside.get("partial_rotary_factor", 1.0),
        }

    def _kind(self, said: dict[str, Any]) -> str:
        """Removes and returns the type of an object. An object with only a theta has transformers' type "default"."""
        kinds = {key: said.pop(key) for key in ("rope_type", "type") if key in said}
        if not kinds and said:
            raise LlamaJaxError(
                f"{self.source}: missing key 'rope_type' beside {shortened(min(map(str, said)))}: expected one of "
                f"{', '.join(('default', *_NAMES))}"
            )
        for key, kind in kinds.items():
            # Early files of Phi-3 name longrope so.
            if kind == "su" or (kind == "yarn" and "short_factor" in said):
                kinds[key] = kind = "longrope"
            if not isinstance(kind, str) or kind not in ("default", *_NAMES):
                raise LlamaJaxError(
                    f"{self.source}: {key} is {shortened(kind)}, which is not supported: expected one of "
                    f"{', '.join(('default', *_NAMES))}"
                )
        if len(set(kinds.values())) > 1:
            raise LlamaJaxError(f"{self.source}: rope_type and type differ ({kinds}): expected one of them")
        return next(iter(kinds.values()), "default")

    def _scaling(self, kind: str, said: dict[str, Any]) -> dict[str, Any]:
        """Converts an object to the form of `RopeScaling.to_dict`."""
        names = _NAMES[kind]
        if _ORIGINAL in names:
            said.setdefault(_ORIGINAL, self.context_length)
            if self.original is not None:
                said[_ORIGINAL] = self.original
        if kind in ("yarn", "longrope") and "factor" not in said:
            said["factor"] = self._ratio(said[_ORIGINAL])
        self._check_names(kind, said)
        missing = [name for name in _REQUIRED[kind] if name not in said]
        if missing:
            raise LlamaJaxError(
                f"{self.source}: missing key {missing[0]!r}: rope_type {kind!r} needs {', '.join(_REQUIRED[kind])}"
            )
        scaling = {"kind": kind} | {ours: said[theirs] for theirs, ours in names.items() if theirs in said}
        if kind == "dynamic":
            scaling["original_context_length"] = self.context_length
        return scaling

    def _ratio(self, original: Any) -> float:
        """The ratio of the model's context to the original one, at least 1."""
        check_whole(f"{self.source}: {_ORIGINAL}", original)
        check_whole(f"{self.source}: max_position_embeddings", self.context_length)
        return max(1.0, self.context_length / original)

    def _check_names(self, kind: str, said: Mapping[str, Any]) -> None:
        """Refuses names that have no meaning for a type."""
        names = _NAMES.get(kind, {})
        unknown = sorted(str(name) for name in said if name not in names and name not in _IGNORED.get(kind, ()))
        if unknown:
            raise LlamaJaxError(
                f"{self.source}: {shortened(unknown[0])} is not supported for rope_type {kind!r}: expected "
                f"{', '.join(names) or 'nothing'}"
            )


def write_rope(config: Config, form: Format, own: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Returns the keys for a config's RoPE, in the spelling that transformers 4 and 5 read.

    If layers with windows have their own RoPE, the spelling of transformers 5 is added.

    Args:
        config: the model's config.
        form: the family's format.
        own: the family's own names and values in the object of RoPE parameters.
    """
    fields: dict[str, Any] = {"rope_theta": config.rope_theta}
    if config.rope_fraction != 1 and form.partial_rope:
        fields["partial_rotary_factor"] = config.rope_fraction
    scaling = config.rope_scaling
    if scaling is not None or own:
        fields["rope_scaling"] = _object(scaling, config.context_length) | dict(own)
    if scaling is not None and scaling.kind == "longrope":
        fields[_ORIGINAL] = scaling.original_context_length
    if form.window_rope and "window" in config.layer_kinds:
        window = config.rope("window")
        assert window is not None
        if _LOCAL_THETA in form.defaults and window.scaling is None:
            fields[_LOCAL_THETA] = window.theta
        if window != Rope(theta=fields.get(_LOCAL_THETA, config.rope_theta)):
            fields.pop("rope_scaling", None)  # transformers 4 has no spelling for it
        ropes = {_FULL: Rope(theta=config.rope_theta, scaling=scaling), _WINDOW: window}
        fields["rope_parameters"] = {
            name: {"rope_theta": rope.theta} | _object(rope.scaling, config.context_length)
            for name, rope in ropes.items()
        }
    return fields


def _object(scaling: RopeScaling | None, context_length: int) -> dict[str, Any]:
    """A scaling with transformers' names."""
    if scaling is None:
        return {"rope_type": "default"}
    said = scaling.to_dict()
    fields = {theirs: said[ours] for theirs, ours in _NAMES[scaling.kind].items() if ours in said}
    if scaling.kind == "yarn" and scaling.truncate:
        del fields["truncate"]  # unknown to earlier versions of transformers 4
    if scaling.kind != "longrope":
        return {"rope_type": scaling.kind} | fields
    # For Phi-3, transformers 4 accepts only this form: three keys, and the original context outside the object.
    del fields[_ORIGINAL]
    if scaling.factor == max(1.0, context_length / scaling.original_context_length):
        del fields["factor"]
    return {"type": "longrope"} | fields
