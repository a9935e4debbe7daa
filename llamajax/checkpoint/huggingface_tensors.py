"""Reads safetensors files of models for text and images under the tensor names of models for text alone.

Reference: the mapping "llava" of transformers' `conversion_mapping.py`, which Gemma 3 and Mistral 3 follow.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from llamajax.errors import LlamaJaxError
from llamajax.files import shortened

# Prefixes of the text model's names, in files of transformers 4 and 5, and their replacement in a model without images.
_TEXT = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_IMAGES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def text_names(names: Iterable[str], source: str) -> Mapping[str, str]:
    """Returns the names in a file by the names in a model for text alone; tensors only for images are left out.

    Raises:
        LlamaJaxError: if two tensors get the same name.
    """
    found: dict[str, str] = {}
    for name in names:
        if name.startswith(_IMAGES):
            continue
        before = next((before for before in _TEXT if name.startswith(before)), "")
        plain = _TEXT[before] + name[len(before) :] if before else name
        if plain in found:
            raise LlamaJaxError(
                f"{source}: tensors {shortened(found[plain])} and {shortened(name)} are one weight: "
                "expected one of them"
            )
        found[plain] = name
    return found


class TextTensors:
    """An opened safetensors file, with the names of `text_names`.

    Attributes:
        images: number of tensors that were left out.
    """

    def __init__(self, opened: Any, source: str):
        """Wraps the result of `safetensors.safe_open`."""
        held = opened.keys()
        self._opened, self._names = opened, text_names(held, source)
        self.images = len(held) - len(self._names)

    def __enter__(self) -> "TextTensors":
        """Opens the file."""
        self._opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Closes the file."""
        self._opened.__exit__(*error)

    def keys(self) -> list[str]:
        """Returns all names."""
        return list(self._names)

    def offset_keys(self) -> list[str]:
        """Returns all names, in the order of the tensors in the file."""
        plain = {theirs: name for name, theirs in self._names.items()}
        return [plain[name] for name in self._opened.offset_keys() if name in plain]

    def get_slice(self, name: str) -> Any:
        """Returns a tensor that is read when it is indexed."""
        return self._opened.get_slice(self._names[name])

    def get_tensor(self, name: str) -> Any:
        """Reads a tensor."""
        return self._opened.get_tensor(self._names[name])
