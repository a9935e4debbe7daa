"""Reads mutations of GGUF files in this process until one is neither refused by our error nor loaded soundly.

    python -m tests.gguf_mutations FOLDER FIRST COUNT        # prints how many were refused, and how many were loaded

Mutation number i is the same on every machine. Some mutations change bytes anywhere. Others change the content: keys
and tensors are left out, repeated, or given another type or value, and the file is written again with that content.
"""

import copy
import json
import random
import resource
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# What must not happen while a file is read.
_FORBIDDEN = (
    "exec",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
)
_MOST_SECONDS = 3.0
_MOST_MEBIBYTES = 200


class Document:
    """The content of a file: keys with types and values, tensors with shapes, types and blocks.

    An array's value is (type of its elements, [value, …]).
    """

    def __init__(self, keys: list[list[Any]], tensors: list[list[Any]]):
        """Takes lists of [name, type, value] and of [name, sizes, type, bytes]."""
        self.keys, self.tensors = keys, tensors
        self.version, self.order = 3, "<"
        self.alignment = 32

    def number(self, letter: str, value: Any) -> bytes:
        """Encodes a number; an integer is reduced to the bits of its type."""
        if letter in "fd":
            return struct.pack(self.order + letter, value)
        bits = 8 * struct.calcsize(self.order + letter)
        value = int(value) % (1 << bits)
        return struct.pack(self.order + letter.upper() if letter != "?" else "B", value)

    def string(self, value: Any) -> bytes:
        """Encodes a length and bytes."""
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        return struct.pack(self.order + "Q", len(data)) + data

    def value(self, kind: int, value: Any) -> bytes:
        """Encodes a value as if it had the given type."""
        try:
            if kind == _ARRAY:
                inner, values = value
                head = struct.pack(f"{self.order}IQ", inner % (1 << 32), len(values))
                return head + b"".join(self.value(inner, each) for each in values)
            if kind == _STRING:
                return self.string(value)
            return self.number(_LETTERS.get(kind, "I"), value)
        except (TypeError, ValueError, OverflowError, struct.error):
            return b"\1\0\0\0\0\0\0\0"

    def bytes(self) -> bytes:
        """Encodes the file."""
        made = [b"GGUF", struct.pack(f"{self.order}IQQ", self.version, len(self.tensors), len(self.keys))]
        for name, kind, value in self.keys:
            made += [self.string(name), struct.pack(self.order + "I", kind % (1 << 32)), self.value(kind, value)]
        offset = 0
        data = []
        for name, sizes, kind, blocks, *moved in self.tensors:
            made += [self.string(name), struct.pack(self.order + "I", len(sizes) % (1 << 32))]
            made += [struct.pack(self.order + "Q", size % (1 << 64)) for size in sizes]
            place = (offset + (moved[0] if moved else 0)) % (1 << 64)
            made.append(struct.pack(f"{self.order}IQ", kind % (1 << 32), place))
            data.append(blocks + bytes(-len(blocks) % self.alignment))
            offset += len(data[-1])
        head = b"".join(made)
        return head + bytes(-len(head) % self.alignment) + b"".join(data)


# ---- Mutations -------------------------------------------------------------------------------------------------------

_WHOLE = (
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    33,
    255,
    256,
    1 << 16,
    1 << 27,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 63,
    (1 << 64) - 1,
    -1,
)
_FLOATS = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-30, 1e38, 0.5)
_TEXTS = (
    "",
    "\0",
    "llama",
    "gpt2",
    "bert",
    "\ufeff",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    "x" * 5000,
    "<|x|>",
    "▁",
    "{{",
    "../x",
)
_NESTED: Any = (0, [])
for _ in range(7):
    _NESTED = (_ARRAY, [_NESTED, _NESTED][: 1 + (_ % 2)])


def _odd(draw: random.Random) -> tuple[int, Any]:
    """Returns a type and a value, both unusual."""
    return draw.choice(
        [
            (draw.choice([0, 1, 2, 3, 4, 5, 10, 11]), draw.choice(_WHOLE)),
            (draw.choice([6, 12]), draw.choice(_FLOATS)),
            (7, draw.choice([0, 1, 2])),
            (_STRING, draw.choice(_TEXTS)),
            (_ARRAY, (4, list(range(draw.choice([0, 1, 2, 64]))))),
            (_ARRAY, (_STRING, ["a"] * draw.choice([0, 1, 320, 3000]))),
            (_ARRAY, _NESTED),
            (draw.choice([13, 99, -1]), 0),
        ]
    )


def _change_key(draw: random.Random, document: Document) -> None:
    """Changes one key: left out, repeated, of another value or type, or a changed array."""
    number = draw.randrange(len(document.keys))
    key = document.keys[number]
    action = draw.randrange(8)
    if action == 0:
        del document.keys[number]
    elif action == 1:
        document.keys.insert(draw.randrange(len(document.keys) + 1), copy.deepcopy(key))
    elif action == 2:
        key[0] = draw.choice(
            [b"\xff", "", "llama.x", "tokenizer.ggml.x", "general.alignment", key[0] + "x", "k" * 2000]
        )
    elif action <= 4:
        key[1], key[2] = _odd(draw)
    elif action == 5 and key[1] not in (_STRING, _ARRAY):
        key[2] = draw.choice(_FLOATS if key[1] in (6, 12) else _WHOLE)
    elif key[1] == _ARRAY and key[2][1]:
        inner, values = key[2]
        at = draw.randrange(len(values))
        change = draw.randrange(6)
        if change == 0:
            values = values[:at]
        elif change == 1:
            values = values + values[:at]
        elif change == 2:
            inner = draw.choice([0, 4, 5, 6, 7, _STRING, _ARRAY, 13])
        elif inner == _STRING:
            values = [*values[:at], draw.choice([*_TEXTS, values[0]]), *values[at + 1 :]]
        else:
            values = [*values[:at], draw.choice(_FLOATS if inner in (6, 12) else _WHOLE), *values[at + 1 :]]
        key[2] = (inner, values)
    else:
        key[2] = draw.choice(_TEXTS) if key[1] == _STRING else draw.choice(_WHOLE)


def _change_tensor(draw: random.Random, document: Document) -> None:
    """Changes one tensor: left out, repeated, moved, of another name, shape or type, or with odd numbers in blocks."""
    number = draw.randrange(len(document.tensors))
    tensor = document.tensors[number]
    action = draw.randrange(7)
    if action == 0:
        del document.tensors[number]
    elif action == 1:
        document.tensors.insert(number, copy.deepcopy(tensor))
    elif action == 2:
        tensor[0] = draw.choice(
            ["", "rope_freqs.weight", "output.weight", tensor[0] + ".x", b"\xff\xff", "blk.9.attn_q.weight"]
        )
    elif action == 3:
        sizes = list(tensor[1])
        sizes[draw.randrange(len(sizes))] = draw.choice(_WHOLE)
        tensor[1] = draw.choice([sizes, tensor[1][::-1], [*tensor[1], 1], [], [1] * 5, [*tensor[1], *tensor[1]]])
    elif action == 4:
        tensor[2] = draw.choice([*range(45), 1 << 31, -1])
    elif action == 5:
        tensor[4:] = [draw.choice([1, 32, -32, 1 << 20, 1 << 40, 1 << 63, -1])]
    else:
        blocks = bytearray(tensor[3])
        for _ in range(draw.choice([1, 1, 8])):
            at = draw.randrange(max(len(blocks) - 1, 1))
            blocks[at : at + 2] = draw.choice([b"\0\x7c", b"\0\x7e", b"\xff\xff", b"\0\0", draw.randbytes(2)])
        tensor[3] = bytes(blocks)


def _change_bytes(draw: random.Random, data: bytes) -> bytes:
    """Changes bytes and numbers anywhere, most of them in the header; or cuts the file short, or appends to it."""
    made = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 4])):
        at = draw.randrange(min(len(made), draw.choice([32, 4096, len(made)])) - 8)
        change = draw.randrange(4)
        if change == 0:
            made[at] = draw.randrange(256)
        elif change == 1:
            made[at] ^= 1 << draw.randrange(8)
        else:
            kind = "<I" if change == 2 else "<Q"
            struct.pack_into(kind, made, at, draw.choice(_WHOLE) % (1 << 8 * struct.calcsize(kind)))
    if draw.random() < 0.1:
        del made[draw.randrange(len(made)) :]
    if draw.random() < 0.05:
        made += draw.randbytes(64)
    return bytes(made)


def mutated(document: Document, number: int) -> bytes:
    """Returns mutation `number` of a document."""
    draw = random.Random(number)
    document = copy.deepcopy(document)
    if draw.random() < 0.1:
        document.order = ">"
    if draw.random() < 0.03:
        document.version = draw.choice([0, 1, 2, 4, 1 << 16])
    if draw.random() < 0.03:
        document.alignment = draw.choice([1, 8, 64])
    changes: list[Callable[[random.Random, Document], None]] = [_change_key, _change_key, _change_tensor]
    if draw.random() < 0.65:
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            if document.keys and document.tensors:
                draw.choice(changes)(draw, document)
        return document.bytes()
    return _change_bytes(draw, document.bytes())


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read(path: Path, whole: bool) -> None:
    """Opens a file and uses all of it: each weight, or the model; the tokenizer in both directions."""
    import jax

    import llamajax

    opened = llamajax.open_checkpoint(path)
    tokenizer = llamajax.checkpoint.read_tokenizer(opened)
    if tokenizer is not None:
        ids = tokenizer.encode("Once upon a time 🙂\n 12")
        assert all(0 <= each < opened.config.vocab_size for each in ids)
        tokenizer.decode(ids)
    if whole:
        weights = llamajax.weights_of(opened.read(shardings="host"))
    else:
        weights = {place: opened.read_weight(place) for place in opened.source.order}
    for place, weight in weights.items():
        assert tuple(weight.shape) == tuple(opened.source.abstract[place].shape)
        for leaf in jax.tree.leaves(weight):
            assert leaf.dtype == np.uint8 or np.isfinite(np.asarray(leaf, np.float32)).all()


def main(folder: Path, first: int, count: int) -> None:
    """Makes mutations of every document in a folder, and prints how many were refused and how many loaded."""
    import pickle

    from llamajax import LlamaJaxError

    documents = [pickle.loads(path.read_bytes()) for path in sorted(folder.glob("*.document"))]
    path = folder / "mutated.gguf"
    for document in documents:
        path.write_bytes(document.bytes())
        read(path, whole=False)
        read(path, whole=True)
    happened: list[str] = []
    sys.addaudithook(lambda event, args: happened.append(event) if event in _FORBIDDEN else None)
    happened.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = {"refused": 0, "loaded": 0}
    for number in range(first, first + count):
        data = mutated(documents[number % len(documents)], number)
        path.write_bytes(data)
        print(number, file=sys.stderr, flush=True)
        start = time.process_time()
        try:
            read(path, whole=number % 16 == 0)
            counts["loaded"] += 1
        except LlamaJaxError as error:
            assert str(error).isprintable() and 0 < len(str(error)) < 1500, error
            counts["refused"] += 1
        spent = time.process_time() - start
        assert spent < _MOST_SECONDS, f"{spent:.2f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> (20 if sys.platform == "darwin" else 10)
    assert grown < _MOST_MEBIBYTES, f"{grown} MiB"
    assert not happened, happened
    print(json.dumps(counts | {"mebibytes": grown}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
