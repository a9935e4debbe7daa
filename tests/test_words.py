"""Text settings (`Words`): read from every file that has them, kept in every form, and used or reported."""

import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import llamajax
from export.bundle import vocabulary_of
from llamajax import LlamaJaxError, Tokenizer, open_checkpoint, save_checkpoint
from llamajax.checkpoint import read_tokenizer
from llamajax.checkpoint.huggingface_words import read_words
from llamajax.cli import main
from llamajax.evaluation.evaluate import text_windows
from llamajax.tokenizer.added import AddedPatterns
from llamajax.words import AddedToken, Words
from tests.reference import random_model

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True, database=None)
START, END, TOOL = 320, 321, 322
CHAT = {
    str(START): {"content": "<|im_start|>", "special": True, "normalized": False},
    str(END): {"content": "<|im_end|>", "special": True, "normalized": False},
    str(TOOL): {"content": "<tool>", "special": False, "normalized": False},
}
# Bytes that are no tokenizer.
UNKNOWN = b"a vocabulary of another kind\n"


@pytest.fixture(scope="module")
def bare(tiny_config: llamajax.Config, tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with 328 embeddings, no text settings, and a tokenizer.model of 320 pieces."""
    fields = tiny_config.to_dict() | {"vocab_size": 328}
    path = tmp_path_factory.mktemp("words") / "bare"
    save_checkpoint(random_model(llamajax.Config.from_dict(fields)), path, form="huggingface")
    (path / "tokenizer.model").write_bytes(tiny_tokenizer.model_bytes)
    return path


@pytest.fixture
def folder(bare: Path, tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that copies `bare`, with more files and more fields in its config.json."""
    numbers = itertools.count()

    def make(config: dict[str, Any] | None = None, **files: Any) -> Path:
        path = Path(shutil.copytree(bare, tmp_path / f"folder{next(numbers)}"))
        fields = json.loads((path / "config.json").read_text()) | (config or {})
        for name, value in {"config": fields, **files}.items():
            (path / f"{name}.json").write_text(json.dumps(value))
        return path

    return make


@pytest.fixture
def processor(tiny_tokenizer: Tokenizer) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer's model, read by sentencepiece itself."""
    return sentencepiece.SentencePieceProcessor(model_proto=tiny_tokenizer.model_bytes)


def tokenizer_of(path: Path) -> Tokenizer:
    tokenizer = read_tokenizer(open_checkpoint(path))
    assert tokenizer is not None
    return tokenizer


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


# ---- Where generation ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "files", "stops"),
    [
        ({}, {}, {1, 2}),  # no setting: BOS and EOS, as llama2.c's models need
        ({"eos_token_id": None}, {"generation_config": {"eos_token_id": None}}, {1, 2}),
        ({"eos_token_id": 2}, {}, {2}),
        ({"eos_token_id": [2, END]}, {}, {2, END}),
        ({"eos_token_id": 2}, {"generation_config": {"eos_token_id": [END, 300]}}, {END, 300}),
        ({"eos_token_id": END}, {"generation_config": {"bos_token_id": 1}}, {END}),
        ({}, {"tokenizer_config": {"eos_token": "<|im_end|>", "added_tokens_decoder": CHAT}}, {END}),
        (
            {},
            {"special_tokens_map": {"eos_token": {"content": "<|im_end|>"}}, "added_tokens": {"<|im_end|>": END}},
            {END},
        ),
    ],
)
def test_ids_at_which_generation_ends(config: Any, files: Any, stops: set[int], folder, tmp_path: Path) -> None:
    """The ids are the same in the folder, in our own form made of it, and in a folder made of that."""
    path = folder(config, **files)
    assert set(tokenizer_of(path).stop_ids) == stops
    for form in ("llamajax", "huggingface"):
        model, tokenizer = llamajax.load(path)
        path = tmp_path / f"as-{form}"
        save_checkpoint(model, path, tokenizer=tokenizer, form=form)  # type: ignore[arg-type]
        assert set(tokenizer_of(path).stop_ids) == stops, form


def test_generation_ends_at_every_listed_id(folder) -> None:
    model, tokenizer = llamajax.load(folder({"eos_token_id": [2, 327]}))
    options = {"temperature": 0, "max_new_tokens": 12}
    whole = llamajax.generate(model, tokenizer, "fox", **options)
    assert whole.finish_reason == "length"
    for at in (2, 5):
        stop = whole.tokens[at]
        path = folder({"eos_token_id": 2}, generation_config={"eos_token_id": [2, stop]})
        ended = llamajax.generate(model, tokenizer_of(path), "fox", **options)
        assert ended.finish_reason == "stop" and ended.tokens == whole.tokens[: whole.tokens.index(stop)]


# ---- What goes around a text, and the tokens in it ------------------------------------------------------------------


def test_bos_and_eos_as_the_folder_says(folder, processor, tiny_tokenizer: Tokenizer) -> None:
    pieces = processor.encode("the fox")
    expected = {
        (None, None): [1, *pieces],
        (False, None): pieces,
        (True, True): [1, *pieces, 2],
        (False, True): [*pieces, 2],
    }
    for (bos, eos), ids in expected.items():
        said = {"add_bos_token": bos, "add_eos_token": eos}
        tokenizer = tokenizer_of(folder(tokenizer_config=said))
        assert tokenizer.encode("the fox") == ids
        assert tokenizer.encode("the fox", bos=True, eos=False) == [1, *pieces]
    assert tokenizer_of(folder(tokenizer_config={"bos_token": None})).encode("the fox") == pieces
    # A prompt gets no EOS; llama.cpp's chunks have a BOS only if the tokenizer adds one.
    text = "the fox " * 40
    without = tokenizer_of(folder(tokenizer_config={"add_bos_token": False}))
    assert text_windows(text, without, 16, "llama.cpp").rows[0].tolist() == processor.encode(text)[:16]
    assert set(text_windows(text, tiny_tokenizer, 16, "llama.cpp").rows[:, 0]) == {1}
    model = llamajax.load(folder())[0]
    ending = tokenizer_of(folder(tokenizer_config={"add_eos_token": True}))
    assert llamajax.generate(model, ending, "fox", max_new_tokens=1, temperature=0).prompt_tokens == 1 + len(
        processor.encode("fox")
    )


@pytest.mark.parametrize("source", ["tokenizer_config", "added_tokens", "tokenizer"])
def test_added_tokens_are_one_id(source: str, folder, processor) -> None:
    texts = {token["content"]: int(index) for index, token in CHAT.items()}
    entries = [{"id": int(index), **token} for index, token in CHAT.items()]
    files: dict[str, Any] = {
        "tokenizer_config": {"tokenizer_config": {"added_tokens_decoder": CHAT}},
        "added_tokens": {
            "added_tokens": texts,
            "special_tokens_map": {"additional_special_tokens": ["<|im_start|>", {"content": "<|im_end|>"}]},
        },
        "tokenizer": {"tokenizer": {"added_tokens": entries}},
    }[source]
    tokenizer = tokenizer_of(folder(**files))
    assert tokenizer.vocab_size == 323
    text = "<|im_start|>user\nfox<|im_end|>\na<tool> fox"
    ids = tokenizer.encode(text, special=True)
    assert [index for index in ids if index >= 320] == [START, END, TOOL] and ids[:2] == [1, START]
    assert (
        "".join(processor.id_to_piece(index) for index in ids[2 : ids.index(END)]).replace("<0x0A>", "\n")
        == "user\nfox"
    )
    assert tokenizer.decode(ids) == "user\nfox\na<tool> fox"
    # Special tokens are plain text unless special=True.
    assert [index for index in tokenizer.encode(text) if index >= 320] == [TOOL]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("fox") == [1, *processor.encode("fox")]
    # Control tokens that no file lists are encoded as text.
    assert tokenizer.encode("<s>", bos=False) == processor.encode("<s>")


def test_control_tokens_are_read_from_the_text_if_asked_for(folder, processor) -> None:
    listed = {"1": {"content": "<s>", "special": True}, "2": {"content": "</s>", "special": True}}
    tokenizer = tokenizer_of(folder(tokenizer_config={"added_tokens_decoder": listed}))
    assert tokenizer.encode("a</s><s>", bos=False, special=True) == [*processor.encode("a"), 2, 1]
    assert tokenizer.encode("a</s><s>", bos=False) == processor.encode("a</s><s>")
    assert tokenizer_of(folder()).encode("a</s><s>", bos=False, special=True) == [*processor.encode("a"), 2, 1]
    assert tokenizer.decode([1, *processor.encode("a"), 2]) == "a"


def test_space_before_text(folder, processor) -> None:
    """transformers' `legacy` adds a space after every added token, too; without `add_prefix_space` there is none."""
    text, (space,) = "fox<tool>fox", processor.encode(" ", add_bos=False)[:1]
    for said, spaces in (({}, 1), ({"legacy": False}, 1), ({"legacy": True}, 2), ({"add_prefix_space": False}, 0)):
        tokenizer = tokenizer_of(folder(tokenizer_config=said | {"added_tokens_decoder": CHAT}))
        pieces = "".join(tokenizer.piece(index) for index in tokenizer.encode(text, bos=False))
        assert pieces.count("▁") == spaces
    assert tokenizer.decode(tokenizer.encode(" fox")) == " fox" and tokenizer.decode(tokenizer.encode("fox")) == "fox"
    assert processor.id_to_piece(space).startswith("▁")


_FLAGS = st.fixed_dictionaries(
    {name: st.booleans() for name in ("special", "lstrip", "rstrip", "single_word", "normalized")}
)


@PROPERTY
@given(
    flags=st.lists(_FLAGS, min_size=4, max_size=4),
    parts=st.lists(
        st.sampled_from(["<A>", "<A", "B>", "word", "<AB>", " ", "  ", "\n", "x", "é", "_", "."]), max_size=12
    ),
)
def test_added_tokens_are_found_as_tokenizers_does(flags, parts) -> None:
    """Tokens are found as by Hugging Face's tokenizers, with one id for all text between them."""
    text = "".join(parts)
    contents = ["<A>", "<AB>", "word", "B>"]
    model = tokenizers.models.WordLevel({"[other]": 0}, unk_token="[other]")
    theirs = tokenizers.Tokenizer(model)
    added = [tokenizers.AddedToken(c, **each) for c, each in zip(contents, flags, strict=True)]
    theirs.add_tokens(added)
    encoded = theirs.encode(text, add_special_tokens=False)
    tokens = tuple(
        AddedToken(id=400 + i, text=c, **each) for i, (c, each) in enumerate(zip(contents, flags, strict=True))
    )
    parts_of_ours = list(AddedPatterns(tokens).parts(text))
    assert [at for at, _ in parts_of_ours] == [start for start, _ in encoded.offsets]
    assert [0 if isinstance(part, str) else part - 399 for _, part in parts_of_ours] == encoded.ids


def test_ids_that_nothing_names_decode_as_unknown(folder) -> None:
    tokenizer = tokenizer_of(folder(added_tokens={"<|im_end|>": 325}))
    assert tokenizer.vocab_size == 326 and tokenizer.decode([325]) == "<|im_end|>"
    assert tokenizer.decode([322]) == "\N{REPLACEMENT CHARACTER}"


def test_what_runners_of_a_bundle_get(folder, tiny_tokenizer: Tokenizer) -> None:
    tokenizer = tokenizer_of(folder({"eos_token_id": [2, END]}, tokenizer_config={"added_tokens_decoder": CHAT}))
    vocabulary, plain = vocabulary_of(tokenizer).values, vocabulary_of(tiny_tokenizer).values
    assert vocabulary["stop"] == [2, END] and plain["stop"] == [1, 2]
    assert [vocabulary["texts"][str(index)] for index in (320, 321, 322)] == ["", "", "<tool>"]
    assert vocabulary["pieces"] == [*plain["pieces"], None, None, None] and vocabulary["model"] == plain["model"]


# ---- Kept through every form ----------------------------------------------------------------------------------------

SAID = {
    "generation_config": {"eos_token_id": [2, END], "temperature": 0.6, "top_k": 20, "do_sample": True},
    "tokenizer_config": {"add_bos_token": False, "eos_token": "<|im_end|>", "added_tokens_decoder": CHAT, "x": [1]},
    "tokenizer": {"anything": 1},
    "special_tokens_map": {"bos_token": "<s>"},
    "added_tokens": {"<tool>": TOOL},
}


def test_files_come_through_unchanged(folder, tmp_path: Path, capsys) -> None:
    source = folder({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, **SAID)
    before = open_checkpoint(source)
    assert before.words.sampling == {"temperature": 0.6, "top_k": 20}
    assert (before.words.bos_id, before.words.pad_id) == (1, 0)
    path = source
    for form in ("llamajax", "huggingface"):
        previous, path = path, tmp_path / form
        assert run(capsys, "convert", f"--model={previous}", f"--to={form}", f"--output={path}")[0] == 0
        assert open_checkpoint(path).words == before.words
        assert tokenizer_of(path).encode("<tool>fox") == tokenizer_of(source).encode("<tool>fox")
    for name in SAID:
        assert (path / f"{name}.json").read_bytes() == (source / f"{name}.json").read_bytes()
    config = json.loads((path / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, [2, END], 0)
    packed = tmp_path / "packed"
    assert run(capsys, "quantize", f"--model={source}", "--recipe=int8", f"--output={packed}")[0] == 0
    assert open_checkpoint(packed).words == before.words


def test_files_of_another_tokenizer_stay_behind(folder, tmp_path: Path, tiny_tokenizer: Tokenizer, capsys) -> None:
    """With another tokenizer, the model's ids still apply, but its tokenizer.json is not copied."""
    source = folder(**SAID)
    (source / "tokenizer.model").unlink()
    (tmp_path / "named.model").write_bytes(tiny_tokenizer.model_bytes)
    argv = [f"--model={source}", f"--tokenizer={tmp_path / 'named.model'}", "--to=huggingface"]
    assert run(capsys, "convert", *argv, f"--output={tmp_path / 'out'}")[0] == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    tokenizer = tokenizer_of(tmp_path / "out")
    assert tokenizer.stop_ids == (2, END) and tokenizer.encode("<tool>", bos=False) == [TOOL] and not tokenizer.add_bos


def test_what_came_without_files_is_written(bare: Path, tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    """A model without such files, as from llama2.c, is saved with ids and tokenizer settings for other readers."""
    model = llamajax.load(bare)[0]
    save_checkpoint(model, tmp_path / "out", tokenizer=tiny_tokenizer, form="huggingface")
    read = {
        name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("config", "generation_config")
    }
    for fields in read.values():
        assert (fields["bos_token_id"], fields["eos_token_id"]) == (1, [2, 1])
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (said["bos_token"], said["eos_token"], said["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert said["add_bos_token"] is True and said["add_eos_token"] is False
    greedy = Words(sampling={"temperature": 0, "repetition_penalty": 1.1})
    save_checkpoint(model, tmp_path / "greedy", words=greedy, form="huggingface")
    assert open_checkpoint(tmp_path / "greedy").words.sampling == greedy.sampling


def test_checkpoints_that_say_nothing_are_as_they_were(bare: Path, tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    save_checkpoint(llamajax.load(bare)[0], tmp_path / "own", tokenizer=tiny_tokenizer)
    assert "words" not in json.loads((tmp_path / "own" / "manifest.json").read_text())
    assert not (tmp_path / "own" / "words").exists()
    opened = open_checkpoint(tmp_path / "own")
    assert opened.words == Words() and tokenizer_of(tmp_path / "own").stop_ids == (1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda words: words.update(colour=1), "manifest.json: words: .*colour.*: it is damaged"),
        (lambda words: words.update(stop_ids=[-1]), "words: stop id is -1: expected a whole number from 0"),
        (lambda words: words.update(stop_ids=3), "words: .*: it is damaged"),
        (lambda words: words.update(add_bos="no"), "words: add_bos is 'no': expected true or false"),
        (lambda words: words.update(space="often"), "words: space is 'often': expected one of first, always, never"),
        (
            lambda words: words.update(sampling={"luck": 1}),
            "words: sampling has luck=1: expected numbers for temperature",
        ),
        (lambda words: words["added"].append({"id": 5}), "words: .*text.*: it is damaged"),
        (lambda words: words["added"].append(words["added"][0]), "words: added tokens share an id"),
        (lambda words: words["files"].update({"../x": ""}), r"words: the files are not those of the manifest"),
        (
            lambda words: words["files"].update({"tokenizer.json": "0"}),
            "words: the files are not those of the manifest",
        ),
        (lambda words: words["files"].update({"chat_template.jinja": ""}), "chat_template.jinja: no such file, though"),
    ],
)
def test_damaged_words(change: Callable[[dict[str, Any]], Any], message: str, folder, tmp_path: Path) -> None:
    model, tokenizer = llamajax.load(folder(**SAID))
    save_checkpoint(model, tmp_path / "own", tokenizer=tokenizer)
    file = tmp_path / "own" / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest["words"])
    del manifest["sha256"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(LlamaJaxError, match=message):
        open_checkpoint(tmp_path / "own")


# ---- Defaults for sampling ------------------------------------------------------------------------------------------


def test_defaults_for_sampling(folder, capsys) -> None:
    """A folder's defaults are used where there is no flag, and reported; the library's own defaults stay."""
    path = folder({"eos_token_id": [2, 327]}, generation_config={"do_sample": False, "repetition_penalty": 1.5})
    argv = ["generate", f"--model={path}", "--prompt=fox", "--max_new_tokens=8", "--json"]
    code, asked, err = run(capsys, *argv)
    line = f"llamajax: {path} sets temperature 0, repetition_penalty 1.5 in its files: flags override this\n"
    assert code == 0 and err.startswith(line)
    code, given, err = run(capsys, *argv, "--temperature=0", "--repetition_penalty=1.5")
    assert given == asked and "files ask" not in err
    _, other, err = run(capsys, *argv, "--repetition_penalty=1")
    assert other != asked and "sets temperature 0 in its files: flags" in err
    tokenizer = tokenizer_of(path)
    assert tokenizer.words.sampling == {"temperature": 0, "repetition_penalty": 1.5}


@pytest.mark.parametrize(
    ("said", "sampling"),
    [
        (
            {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "min_p": 0.1},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "min_p": 0.1},
        ),
        ({"temperature": None, "top_k": 0, "min_p": 0.0, "do_sample": True}, {}),
        ({"temperature": 0.9, "do_sample": False}, {"temperature": 0}),
    ],
)
def test_spellings_of_sampling(said: dict[str, Any], sampling: dict[str, float], folder) -> None:
    assert open_checkpoint(folder(generation_config=said)).words.sampling == sampling
    # transformers 4 kept these in config.json, and looks there only without a generation_config.json.
    assert open_checkpoint(folder(said)).words.sampling == sampling
    assert open_checkpoint(folder(said, generation_config={"eos_token_id": 2})).words.sampling == {}


# ---- What is not used is said ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "files", "note"),
    [
        ({"eos_token_id": [2, 328]}, {}, "config.json: eos_token_id 328 is no id of the model's 328: ignored"),
        ({}, {"added_tokens": {"[PAD]": 328}}, r"added token '\[PAD\]' has id 328, but the model has 328"),
        ({}, {"generation_config": {"no_repeat_ngram_size": 3}}, "no_repeat_ngram_size is 3, which is not supported"),
        ({}, {"generation_config": {"temperature": "hot"}}, "config.json: temperature is 'hot', which is invalid"),
        ({}, {"generation_config": {"top_k": 2.5}}, "generation_config.json: top_k is 2.5, which is invalid"),
        ({}, {"generation_config": {"top_p": 1.5}}, "generation_config.json: top_p is 1.5, which is invalid"),
        (
            {"eos_token_id": 2},
            {"tokenizer_config": {"eos_token": "<|im_end|>", "added_tokens_decoder": CHAT}},
            r"the tokenizer's end, '<\|im_end\|>' \(321\), is not among the eos_token_id of the configs \(2\)",
        ),
    ],
)
def test_notes(config: Any, files: Any, note: str, folder, capsys) -> None:
    path = folder(config, **files)
    with pytest.warns(UserWarning, match=note):
        llamajax.load(path)
    code, _, err = run(capsys, "inspect", f"--model={path}")
    assert code == 0 and err == f"llamajax: {open_checkpoint(path).notes[0]}\n"


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({"eos_token_id": "2"}, {}, "config.json: eos_token_id is '2': expected a token's id, or a list of them"),
        (
            {},
            {"generation_config": {"eos_token_id": [True]}},
            "generation_config.json: eos_token_id is .True.: expected",
        ),
        ({}, {"tokenizer_config": {"add_bos_token": "yes"}}, "add_bos is 'yes': expected true or false"),
        ({}, {"tokenizer_config": {"eos_token": 7}}, "eos_token is 7: expected a text, or an object with its content"),
        ({}, {"tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, "added_tokens_decoder is .*: expected ids"),
        ({}, {"tokenizer_config": {"added_tokens_decoder": {"5": {}}}}, "added token 5 is '': expected a text"),
        (
            {},
            {"tokenizer_config": {"added_tokens_decoder": {"9" * 99: {}}}},
            "added_tokens_decoder is .*: expected ids",
        ),
        ({}, {"added_tokens": {"x": [1]}}, r"added_tokens.json: 'x' is \[1\]: expected its id"),
        ({}, {"added_tokens": {"x": -1}}, "added token is -1: expected a whole number from 0"),
        ({}, {"tokenizer_config": [1]}, "tokenizer_config.json: expected a JSON object, got list"),
        ({}, {"tokenizer": {"added_tokens": [3]}}, "added_tokens of tokenizer.json: expected a list of objects"),
    ],
)
def test_refused_words(config: Any, files: Any, message: str, folder) -> None:
    with pytest.raises(LlamaJaxError, match=message):
        open_checkpoint(folder(config, **files))


_ODD = [
    None,
    True,
    0,
    -1,
    3,
    300,
    10**30,
    0.5,
    float("nan"),
    "",
    "x",
    "<s>",
    "\ud800",
    [],
    [1],
    [[1]],
    {},
    {"content": 5},
]


def _mutated(value: Any, draw: random.Random) -> Any:
    """A JSON value with one part replaced, removed or put under another name."""
    if isinstance(value, dict | list) and value and draw.random() < 0.8:
        value = value.copy()
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        inner = value.pop(key) if isinstance(value, dict) and draw.random() < 0.4 else value[key]
        if key in value if isinstance(value, dict) else True:
            value[key] = _mutated(inner, draw)
        elif draw.random() < 0.5:
            value[draw.choice(["x", "5", "-3", "9" * 11, "300", "²"])] = inner
        return value
    return draw.choice(_ODD)


def test_mutated_files_raise_our_error_or_make_a_tokenizer(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    draw, read = random.Random(0), 0
    more = {"special_tokens_map": {"extra_special_tokens": {"a": "<f>"}, "pad_token": ""}, "added_tokens": {"<g>": 323}}
    for _ in range(200):
        files: dict[str, Any] = SAID | more
        for name in draw.choices(list(files), k=2):
            files = files | {name: _mutated(files[name], draw)}
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        try:
            words, notes = read_words(tmp_path, {"eos_token_id": _mutated(2, draw)}, 328)
            assert Words.from_dict(json.loads(json.dumps(words.to_dict())), words.files) == words
            tokenizer = Tokenizer(tiny_tokenizer.model_bytes, words=words)
            tokenizer.decode([*tokenizer.encode("a <tool> fox<|im_end|>"), *range(tokenizer.vocab_size)])
            read += all(isinstance(note, str) for note in notes)
        except LlamaJaxError as error:
            assert len(str(error)) < 1000
    assert 50 < read < 190


# ---- A tokenizer that is not read -----------------------------------------------------------------------------------


def test_a_tokenizer_that_is_not_read_stops_only_what_needs_text(
    folder, tmp_path: Path, capsys, tiny_tokenizer
) -> None:
    path = folder({"eos_token_id": 2})
    (path / "tokenizer.model").write_bytes(UNKNOWN)
    why = f"{path}: its tokenizer: not a sentencepiece model: expected a tokenizer.model"
    with pytest.warns(UserWarning, match="its tokenizer: not a sentencepiece model"):
        model, tokenizer = llamajax.load(path)
    assert tokenizer is None
    for form in ("llamajax", "huggingface"):
        code, _, err = run(capsys, "convert", f"--model={path}", f"--to={form}", f"--output={tmp_path / form}")
        assert code == 0 and err.startswith(f"llamajax: {why}: continuing without a tokenizer\n")
        assert (tmp_path / form / "tokenizer.model").read_bytes() == UNKNOWN
        assert open_checkpoint(tmp_path / form).words.stop_ids == (2,)
    code, _, err = run(capsys, "quantize", f"--model={path}", "--recipe=int8", f"--output={tmp_path / 'packed'}")
    assert code == 0 and why in err and (tmp_path / "packed" / "tokenizer.model").read_bytes() == UNKNOWN
    code, out, _ = run(capsys, "inspect", f"--model={path}", "--json")
    assert (json.loads(out)["tokenizer"], json.loads(out)["tokenizer_problem"]) == (False, why)
    _, out, _ = run(capsys, "inspect", f"--model={path}")
    assert "cannot be read" in out and "included" not in out
    for command in ("generate", "eval"):
        code, out, err = run(capsys, command, f"--model={path}")
        assert (code, out, err) == (
            1,
            "",
            f"llamajax: {why}: give --tokenizer=PATH of its tokenizer.model or tokenizer.json\n",
        )
    (tmp_path / "named.model").write_bytes(tiny_tokenizer.model_bytes)
    assert llamajax.load(path, tokenizer=tmp_path / "named.model")[1].stop_ids == (2,)


@pytest.mark.parametrize("kind", ["damaged", "too large", "other pieces", "json"])
def test_tokenizers_that_do_not_go_with_the_model(kind: str, folder, bare: Path, tiny_tokenizer: Tokenizer) -> None:
    files: dict[str, Any] = {"added_tokens": {"the wrong": 300}} if kind == "other pieces" else {}
    files |= {"tokenizer": {}} if kind == "json" else {}
    path = folder(**files)
    if kind == "damaged":
        (path / "tokenizer.model").write_bytes(tiny_tokenizer.model_bytes[:500])
    if kind == "json":
        (path / "tokenizer.model").unlink()
    if kind == "too large":
        config = llamajax.Config.from_dict(open_checkpoint(bare).config.to_dict() | {"vocab_size": 319})
        shutil.rmtree(path)
        save_checkpoint(random_model(config), path, tokenizer=tiny_tokenizer)
    message = {
        "damaged": "its tokenizer: not a sentencepiece model",
        "too large": "the tokenizer has 320 ids, the model 319 embeddings: expected the tokenizer that the model was",
        "other pieces": "id 300 is .* in the sentencepiece model, but 'the wrong' among the added tokens",
        "json": "its tokenizer: a tokenizer.json that the library tokenizers cannot read",
    }[kind]
    with pytest.warns(UserWarning, match=message):
        assert llamajax.load(path)[1] is None


def byte_json() -> bytes:
    """A tokenizer.json of 256 bytes and "fo"."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate([*alphabet, "fo"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("f", "o")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made.to_str().encode()


@pytest.mark.parametrize(
    ("said", "has_model", "form"),
    [
        ({}, True, "sentencepiece"),
        ({"tokenizer_class": "LlamaTokenizerFast"}, True, "sentencepiece"),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, True, "tokenizers"),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "legacy": True}, False, "tokenizers"),
        ({}, False, "tokenizers"),
    ],
)
def test_which_tokenizer_a_folder_has(said: Any, has_model: bool, form: str, folder, tmp_path: Path) -> None:
    """transformers uses tokenizer.json, LlamaTokenizer only as much of it as a tokenizer.model has. Both are kept."""
    path = folder(tokenizer_config=said)
    (path / "tokenizer.json").write_bytes(byte_json())
    if not has_model:
        (path / "tokenizer.model").unlink()
    for target in ("huggingface", "llamajax", "huggingface"):
        tokenizer = tokenizer_of(path)
        assert tokenizer.form == form and tokenizer.decode(tokenizer.encode(" fox")) == " fox"
        previous, path = path, tmp_path / f"{target} of {path.name}"
        save_checkpoint(llamajax.load(previous)[0], path, tokenizer=tokenizer, form=target)  # type: ignore[arg-type]
    assert (path / "tokenizer.json").read_bytes() == byte_json() and (path / "tokenizer.model").exists() == has_model


def test_chat_templates_by_name(folder, tmp_path: Path) -> None:
    path = folder()
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (path / "additional_chat_templates" / "no template.jinja").write_text("its name is no name")
    for target in ("llamajax", "huggingface"):
        assert open_checkpoint(path).words.files == {"chat_template.tool_use.jinja": b"{{ tools }}"}
        model, tokenizer = llamajax.load(path)
        path = tmp_path / target
        save_checkpoint(model, path, tokenizer=tokenizer, form=target)  # type: ignore[arg-type]
    assert (path / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"


def test_a_damaged_name_of_the_tokenizers_file(folder, tmp_path: Path) -> None:
    model, tokenizer = llamajax.load(folder())
    save_checkpoint(model, tmp_path / "own", tokenizer=tokenizer)
    manifest = json.loads((tmp_path / "own" / "manifest.json").read_text())
    del manifest["sha256"]
    (tmp_path / "own" / "manifest.json").write_text(json.dumps(manifest | {"tokenizer_file": "../tokenizer.model"}))
    with pytest.raises(LlamaJaxError, match=r"tokenizer_file '\.\./tokenizer.model': it is damaged"):
        open_checkpoint(tmp_path / "own")


def test_a_tokenizer_beside_a_llama2c_file(shared: Path, tmp_path: Path) -> None:
    for name, target in (("stories260K.bin", "model.bin"), ("tok512.bin", "tokenizer.bin")):
        shutil.copy(shared / "data" / "stories260K" / name, tmp_path / target)
    tokenizer = llamajax.load(tmp_path / "model.bin")[1]
    assert tokenizer is not None and tokenizer.vocab_size == 512


def test_llama_3s_own_tokenizer(tiny_config: llamajax.Config, shared: Path, tmp_path: Path, capsys) -> None:
    """A tokenizer.model of ranks gets the names that the folder's files give, and is kept as a tokenizer.json."""
    config = llamajax.Config.from_dict(tiny_config.to_dict() | {"vocab_size": 128256, "width": 8, "num_layers": 1})
    path = tmp_path / "folder"
    save_checkpoint(random_model(config), path, form="huggingface")
    shutil.copy(shared / "data" / "tokenizers" / "llama3_tokenizer.model", path / "tokenizer.model")
    named = {"128004": {"content": "<|the pad|>", "special": True}}
    (path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": named}))
    for form in ("llamajax", "huggingface"):
        assert run(capsys, "convert", f"--model={path}", f"--to={form}", f"--output={tmp_path / form}")[0] == 0
        path = tmp_path / form
        assert (path / "tokenizer.json").is_file() and not (path / "tokenizer.model").exists()
        tokenizer = tokenizer_of(path)
        assert tokenizer.encode("hi<|eot_id|><|the pad|>", special=True) == [128000, 6151, 128009, 128004]
        assert tokenizer.vocab_size == 128256 and tokenizer.form == "tokenizers"
