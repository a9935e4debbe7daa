"""llama.cpp as an independent reference: its logits, text and ids, and files in the types that its quantizer makes.

`xllamacpp` is llama.cpp in a prebuilt wheel. Its extension module exports the C functions of `llama.h` and `ggml.h`,
which this module calls through ctypes. The wheel lacks the quantizer of whole files but has `ggml_quantize_chunk`.
`quantize` therefore writes each tensor by llama.cpp's own code, in the type that `llama_tensor_get_type` of its
llama-quant.cpp chooses for a dense model, with or without an importance matrix (`tests/test_llamacpp.py` compares the
files with those of `llama_model_quantize`, where the extra `llamacpp` is installed).

Keys and values are float32, attention is the plain one, and one thread computes: with F32 weights llama.cpp then rounds
nothing, and no thread waits for another.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest

xllamacpp = pytest.importorskip(
    "xllamacpp.xllamacpp", reason="compares with llama.cpp: install the extra: pip install -e '.[parity]'"
)

Kind = gguf.GGMLQuantizationType
# What `quantize` makes: llama.cpp's name of a file type -> the type of most tensors. For MXFP4, llama.cpp has no
# mixture for dense models; here all matrices have that type.
FILE_TYPES = {
    "F32": Kind.F32,
    "F16": Kind.F16,
    "BF16": Kind.BF16,
    "Q4_0": Kind.Q4_0,
    "Q4_1": Kind.Q4_1,
    "Q5_0": Kind.Q5_0,
    "Q5_1": Kind.Q5_1,
    "Q8_0": Kind.Q8_0,
    "Q2_K": Kind.Q2_K,
    "Q3_K_S": Kind.Q3_K,
    "Q3_K_M": Kind.Q3_K,
    "Q4_K_S": Kind.Q4_K,
    "Q4_K_M": Kind.Q4_K,
    "Q5_K_S": Kind.Q5_K,
    "Q5_K_M": Kind.Q5_K,
    "Q6_K": Kind.Q6_K,
    "IQ4_NL": Kind.IQ4_NL,
    "IQ4_XS": Kind.IQ4_XS,
    "TQ1_0": Kind.TQ1_0,
    "TQ2_0": Kind.TQ2_0,
    "MXFP4": Kind.MXFP4,
}
_FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
# Types where a row is no multiple of the block, as in `tensor_type_fallback`.
_FALLBACK = {Kind.Q2_K: Kind.Q4_0, Kind.Q3_K: Kind.Q4_0, Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1}
_FALLBACK |= {Kind.Q6_K: Kind.Q8_0, Kind.IQ4_XS: Kind.IQ4_NL, Kind.TQ1_0: Kind.Q4_0, Kind.TQ2_0: Kind.Q4_0}


# ---- The library ----------------------------------------------------------------------------------------------------


class _Batch(ctypes.Structure):
    """`llama_batch`. Positions and sequences are null: llama.cpp then continues counting positions, in sequence 0."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class _ModelParams(ctypes.Structure):
    """`llama_model_params`. We set none of its fields, so that only its size matters; it may grow."""

    _fields_ = [("bytes", ctypes.c_uint8 * 512)]


class _ContextParams(ctypes.Structure):
    """The fields of `llama_context_params` up to the last that we set; `_context_params` checks their places."""

    _fields_ = [
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("ctx_type", ctypes.c_int32),
        ("rope_scaling_type", ctypes.c_int32),
        ("pooling_type", ctypes.c_int32),
        ("attention_type", ctypes.c_int32),
        ("flash_attn_type", ctypes.c_int32),
        ("numbers_of_rope", ctypes.c_uint32 * 8),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 512),
    ]


class _Message(ctypes.Structure):
    """`llama_chat_message`."""

    _fields_ = [("role", ctypes.c_char_p), ("content", ctypes.c_char_p)]


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_MODEL, _CONTEXT, _VOCAB = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
_SIGNATURES = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_Log, ctypes.c_void_p]),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (_MODEL, [ctypes.c_char_p, _ModelParams]),
    "llama_model_free": (None, [_MODEL]),
    "llama_model_get_vocab": (_VOCAB, [_MODEL]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [_VOCAB]),
    "llama_init_from_model": (_CONTEXT, [_MODEL, _ContextParams]),
    "llama_free": (None, [_CONTEXT]),
    "llama_get_memory": (ctypes.c_void_p, [_CONTEXT]),
    "llama_memory_clear": (None, [ctypes.c_void_p, ctypes.c_bool]),
    "llama_decode": (ctypes.c_int32, [_CONTEXT, _Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_CONTEXT]),
    "llama_tokenize": (
        ctypes.c_int32,
        [_VOCAB, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool],
    ),
    "llama_token_to_piece": (
        ctypes.c_int32,
        [_VOCAB, ctypes.c_int32, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_bool],
    ),
    "llama_chat_apply_template": (
        ctypes.c_int32,
        [ctypes.c_char_p, ctypes.POINTER(_Message), ctypes.c_size_t, ctypes.c_bool, ctypes.c_char_p, ctypes.c_int32],
    ),
    "ggml_row_size": (ctypes.c_size_t, [ctypes.c_int32, ctypes.c_int64]),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p],
    ),
}
_messages: list[str] = []


@_Log
def _remember(level: int, text: bytes, _: int) -> None:
    """Keeps warnings and errors (levels 3 and 4) for the message of a failure; nothing is printed."""
    if level >= 3:
        _messages.append(text.decode(errors="replace").strip())


@functools.cache
def library() -> ctypes.CDLL:
    """Returns llama.cpp's functions, with their types."""
    functions = ctypes.CDLL(xllamacpp.__file__)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments
    functions.llama_backend_init()
    functions.llama_log_set(_remember, None)
    return functions


def _context_params(slots: int) -> _ContextParams:
    """Returns a context's parameters: its slots, all logits, one batch, float32 keys and values, plain attention."""
    params = library().llama_context_default_params()
    found = (params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max, params.rope_scaling_type)
    found += (params.flash_attn_type, params.type_k, params.type_v)
    expected = (512, 2048, 512, 1, -1, -1, int(Kind.F16), int(Kind.F16))
    assert found == expected, f"llama_context_params has other fields: defaults {found}, expected {expected}"
    params.n_ctx = params.n_batch = params.n_ubatch = slots
    params.n_outputs_max = params.n_outputs_max_per_seq = 0  # All tokens in one batch.
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = 0  # Flash attention is disabled.
    params.type_k = params.type_v = int(Kind.F32)
    return params


def conversation(template: str, said: Sequence[tuple[str, str]], reply: bool) -> str:
    """Returns a conversation as llama.cpp's own chat template of that name formats it."""
    messages = (_Message * len(said))(*[_Message(role.encode(), content.encode()) for role, content in said])
    text = ctypes.create_string_buffer(1 << 16)
    length = library().llama_chat_apply_template(template.encode(), messages, len(said), reply, text, len(text))
    assert 0 <= length < len(text), f"llama.cpp has no chat template {template}"
    return text.raw[:length].decode()


# ---- Models ---------------------------------------------------------------------------------------------------------


class Model:
    """A GGUF file, opened by llama.cpp.

    Attributes:
        vocab_size: number of logits.
    """

    def __init__(self, path: Path | str):
        """Opens the file; raises ValueError with llama.cpp's own message where llama.cpp refuses it."""
        self._functions = library()
        _messages.clear()
        params = self._functions.llama_model_default_params()
        self._model = self._functions.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ValueError(f"llama.cpp refuses {path}: {'; '.join(_messages)}")
        self._vocab = self._functions.llama_model_get_vocab(self._model)
        self.vocab_size = self._functions.llama_vocab_n_tokens(self._vocab)

    def close(self) -> None:
        """Frees the memory."""
        self._functions.llama_model_free(self._model)

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @contextlib.contextmanager
    def _context(self, slots: int) -> Iterator[Callable[..., np.ndarray]]:
        """Yields a function (next ids) -> their logits float32 [T, V], a copy; `forget=True` begins a new sequence."""
        context = self._functions.llama_init_from_model(self._model, _context_params(slots))
        assert context, f"llama.cpp creates no context: {'; '.join(_messages)}"

        def feed(ids: Sequence[int], *, forget: bool = False) -> np.ndarray:
            if forget:
                self._functions.llama_memory_clear(self._functions.llama_get_memory(context), True)
            length = len(ids)
            tokens, wanted = (ctypes.c_int32 * length)(*map(int, ids)), (ctypes.c_int8 * length)(*[1] * length)
            code = self._functions.llama_decode(context, _Batch(length, tokens, None, None, None, None, wanted))
            assert code == 0, f"llama_decode returns {code}: {'; '.join(_messages)}"
            held = self._functions.llama_get_logits(context)
            return np.ctypeslib.as_array(held, (length, self.vocab_size)).copy()

        try:
            yield feed
        finally:
            self._functions.llama_free(context)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits at every position of one sequence from position 0, no BOS added: float32 [T, V]."""
        with self._context(len(ids)) as feed:
            return feed(ids)

    def windows(self, rows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yields `logits` of each row; all rows have one length."""
        with self._context(len(rows[0])) as feed:
            for row in rows:
                yield feed(row, forget=True)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Returns the `count` likeliest next ids, each fed back; end tokens are treated as other ids."""
        with self._context(len(ids) + count) as feed:
            found = [int(feed(ids)[-1].argmax())]
            while len(found) < count:
                found.append(int(feed(found[-1:])[-1].argmax()))
        return found

    def tokenize(self, text: str | bytes, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Returns the ids of a text.

        Args:
            text: UTF-8 if bytes.
            add_special: whether to add BOS and EOS as the file's metadata say.
            parse_special: whether control tokens in the text become their ids; otherwise they are ordinary text.
        """
        data = text if isinstance(text, bytes) else text.encode()
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._functions.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, parse_special)
        assert count >= 0, f"llama_tokenize wants room for {-count} ids, and has {room}"
        return list(ids[:count])

    def piece(self, token: int, *, special: bool = True) -> bytes:
        """Returns the bytes that an id adds to the text; a control token adds none without `special`."""
        buffer = ctypes.create_string_buffer(4096)
        length = self._functions.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        assert length >= 0, f"llama_token_to_piece wants {-length} bytes"
        return buffer.raw[:length]


def logits(path: Path | str, ids: Sequence[int]) -> np.ndarray:
    """`Model.logits` of a file."""
    with Model(path) as model:
        return model.logits(ids)


def greedy(path: Path | str, ids: Sequence[int], count: int) -> list[int]:
    """`Model.greedy` of a file."""
    with Model(path) as model:
        return model.greedy(ids, count)


def tokenize(path: Path | str, text: str | bytes, special: bool = False, bos: bool = False) -> list[int]:
    """Returns the ids of a text by the vocabulary of a file; `special`: control tokens in the text become their ids."""
    with Model(path) as model:
        return model.tokenize(text, add_special=bos, parse_special=special)


# ---- Files ----------------------------------------------------------------------------------------------------------


def quantize_chunk(kind: int | str, floats: np.ndarray, importance_K: np.ndarray | None = None) -> np.ndarray:
    """Quantizes rows by llama.cpp: float32 [M, K] -> uint8 [M, bytes of a row].

    Args:
        kind: number of a ggml type, or its name.
        floats: K is a multiple of the type's block.
        importance_K: mean squares of the inputs, which weight the errors.
    """
    kind = Kind[kind] if isinstance(kind, str) else Kind(kind)
    floats = np.ascontiguousarray(floats, np.float32)
    rows, width = floats.shape
    row = library().ggml_row_size(int(kind), width)
    blocks = np.zeros((rows, row), np.uint8)
    pointers = floats.ctypes.data, blocks.ctypes.data
    if importance_K is not None:
        importance_K = np.ascontiguousarray(importance_K, np.float32)
        assert importance_K.shape == (width,), f"importance of shape {importance_K.shape}, expected {(width,)}"
    weights = None if importance_K is None else importance_K.ctypes.data
    written = library().ggml_quantize_chunk(int(kind), *pointers, 0, rows, width, weights)
    assert written == blocks.nbytes, f"ggml_quantize_chunk wrote {written} bytes, expected {blocks.nbytes}"
    return blocks


def tensor_type(
    file_type: str, name: str, width: int, *, layers: int, tied: bool, grouped: int, importance: bool = False
) -> Kind:
    """Returns the type that llama.cpp's quantizer gives a matrix: `llama_tensor_get_type` for a dense LLaMA.

    Args:
        file_type: a key of FILE_TYPES.
        name: name of the tensor in the file.
        width: K, the length of its rows.
        layers: number of layers of the model.
        tied: whether the file has no output.weight.
        grouped: number of query heads that share a key head.
        importance: whether there is an importance matrix.
    """
    kind = FILE_TYPES[file_type]
    if kind in _FLOATS or file_type == "MXFP4":
        return kind
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        aligned = width % gguf.GGML_QUANT_SIZES[kind][0] == 0
        kind = Kind.Q6_K if aligned and kind != Kind.Q8_0 else Kind.Q8_0
    elif name == "token_embd.weight":
        kind = Kind.Q4_K if file_type in ("TQ1_0", "TQ2_0") else kind
    else:
        kind = _of_layer(file_type, kind, name.split(".")[2], int(name.split(".")[1]), layers, grouped, importance)
    if width % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = _FALLBACK.get(kind, Kind.F16)
        return kind if width % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Kind.F16
    return kind


def _of_layer(file_type: str, kind: Kind, part: str, layer: int, layers: int, grouped: int, importance: bool) -> Kind:
    """Returns a type by llama.cpp's mixtures, which give sensitive tensors more bits."""
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    few, many = layer < layers // 8, grouped >= 4
    chosen = {
        ("Q2_K", "attn_v"): Kind.Q4_K if many else Kind.Q3_K,
        ("Q2_K", "attn_output"): Kind.Q3_K,
        ("Q2_K", "ffn_down"): Kind.Q3_K,
        ("Q3_K_M", "attn_v"): Kind.Q5_K if layer < 2 else Kind.Q4_K,
        ("Q3_K_M", "attn_output"): Kind.Q4_K,
        ("Q3_K_M", "ffn_down"): Kind.Q5_K if layer < layers // 16 else Kind.Q4_K,
        ("Q4_K_S", "attn_v"): Kind.Q5_K if layer < 4 else kind,
        ("Q4_K_S", "ffn_down"): Kind.Q5_K if few else kind,
        ("Q4_K_M", "attn_v"): Kind.Q6_K if more else kind,
        ("Q4_K_M", "ffn_down"): Kind.Q6_K if more else kind,
        ("Q5_K_M", "attn_v"): Kind.Q6_K if more else kind,
        ("Q5_K_M", "ffn_down"): Kind.Q6_K if more else kind,
    }
    for name in ("IQ4_NL", "IQ4_XS"):
        spared = few and not importance
        chosen |= {(name, "attn_v"): Kind.Q5_K if many else kind, (name, "ffn_down"): Kind.Q5_K if spared else kind}
    if importance and few:
        chosen |= {("Q4_0", "ffn_down"): Kind.Q4_1, ("Q5_0", "ffn_down"): Kind.Q5_1}
    return chosen.get((file_type, part), kind)


def quantize(
    source: Path | str, target: Path | str, file_type: str, importance: Mapping[str, np.ndarray] | None = None
) -> dict[str, str]:
    """Quantizes a GGUF file of floats as llama.cpp's quantizer does, by its code, with one tensor in memory at a time.

    Args:
        source: file with F32, F16 or BF16 tensors of a dense model whose layers are a LLaMA's.
        target: file to write.
        file_type: a key of FILE_TYPES.
        importance: mean squares of the inputs by tensor name; errors of other tensors are not weighted.

    Returns:
        Each tensor's type.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    heads, kv_heads, layers = (
        int(reader.get_field(f"{architecture}.{key}").contents())
        for key in ("attention.head_count", "attention.head_count_kv", "block_count")
    )
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    kinds = {}
    for tensor in reader.tensors:
        kinds[tensor.name] = Kind.F32
        if len(tensor.shape) > 1:
            options = {"layers": layers, "tied": tied, "grouped": heads // kv_heads, "importance": bool(importance)}
            kinds[tensor.name] = tensor_type(file_type, tensor.name, int(tensor.shape[0]), **options)
    _rewrite(reader, target, kinds, importance or {})
    return {name: kind.name for name, kind in kinds.items()}


def dequantize(source: Path | str, target: Path | str) -> None:
    """Writes the same file with every tensor in F32, by gguf's own dequantizers."""
    reader = gguf.GGUFReader(source)
    _rewrite(reader, target, dict.fromkeys((tensor.name for tensor in reader.tensors), Kind.F32), {})


def _rewrite(
    reader: gguf.GGUFReader, target: Path | str, kinds: dict[str, Kind], importance: Mapping[str, np.ndarray]
) -> None:
    """Writes a file again with its tensors in other types."""
    writer = gguf.GGUFWriter(target, str(reader.get_field("general.architecture").contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    for name, shape in shapes.items():
        block, size = gguf.GGML_QUANT_SIZES[kinds[name]]
        length = int(np.prod(shape)) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), length, raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        kind = kinds[tensor.name]
        if kind == tensor.tensor_type:
            writer.write_tensor_data(np.ascontiguousarray(tensor.data))
            continue
        floats = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shapes[tensor.name])
        if kind in _FLOATS:
            writer.write_tensor_data(np.ascontiguousarray(gguf.quantize(floats, kind)))
        else:
            writer.write_tensor_data(quantize_chunk(kind, floats, importance.get(tensor.name)))
    writer.close()
