"""The command line as users meet it: outputs, exit codes, one-line errors, help."""

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import llamajax
from llamajax.cli import COMMANDS, main
from llamajax.cli.commands import find_commands
from llamajax.evaluation.evaluate import encode_documents
from llamajax.generation.compilation import is_private
from llamajax.train import story_texts

ROOT = Path(__file__).parents[1]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Runs a command in this process; returns exit code, stdout, stderr."""
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def assert_one_line_error(code: int, out: str, err: str, expected_code: int, *parts: str) -> None:
    assert code == expected_code
    assert out == ""
    assert err.startswith("llamajax: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err, err


def test_generate_prints_the_published_text(shared: Path, capsys) -> None:
    data = shared / "data" / "stories260K"
    argv = [f"--model={data}/stories260K.bin", f"--tokenizer={data}/tok512.model", "--prompt=", "--temperature=0"]
    code, out, err = run(capsys, "generate", *argv, "--max_new_tokens=200")
    assert code == 0
    assert out.encode() == (data / "expected_greedy_200.txt").read_bytes()
    assert "decode     200 tokens" in err and "GB/s" in err and "prefill" in err


def test_generate_uses_the_box_unless_told_otherwise(capsys) -> None:
    argv = ["generate", "--prompt=Once upon a time", "--max_new_tokens=24", "--temperature=0"]
    code, out, err = run(capsys, *argv)
    assert code == 0
    assert out.startswith("Once upon a time") and len(out.split()) > 12
    assert out == "Once upon a time" + run(capsys, *argv, "--noecho")[1]


def test_generate_json_of_a_batch(capsys) -> None:
    argv = ["--prompt=One day", "--prompt=At night the", "--max_new_tokens=8", "--json", "--seed=3"]
    code, out, _ = run(capsys, "generate", *argv)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["prompt"] for row in rows] == ["One day", "At night the"]
    for row in rows:
        assert len(row["tokens"]) == len(row["log_probabilities"]) == 8 and row["finish_reason"] == "length"
        assert max(row["log_probabilities"]) <= 0
    alone = json.loads(run(capsys, "generate", *argv[1:])[1])
    np.testing.assert_allclose(alone.pop("log_probabilities"), rows[1].pop("log_probabilities"), atol=1e-4)
    assert alone == rows[1]


def test_stop_and_seed(capsys) -> None:
    argv = ["generate", "--prompt=Once upon a time", "--max_new_tokens=12", "--temperature=0", "--noecho"]
    whole = run(capsys, *argv)[1]
    word = whole.split()[-2]
    assert run(capsys, *argv, f"--stop={word}")[1] == whole[: whole.index(word)]
    sampled = [run(capsys, *argv, "--temperature=1", f"--seed={seed}")[1] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_speculation_prints_the_same_text_and_what_a_step_made(capsys) -> None:
    argv = ["generate", "--prompt=Once upon a time", "--max_new_tokens=24", "--temperature=0", "--dtype=float32"]
    _, plain, without = run(capsys, *argv)
    code, out, err = run(capsys, *argv, "--speculate=4")
    assert code == 0 and out == plain
    decode = next(line for line in err.splitlines() if line.startswith("decode"))
    assert decode.endswith(" tokens a step") and 1 <= float(decode.split()[-4]) <= 5
    assert "a step" not in without
    assert_one_line_error(*run(capsys, *argv, "--speculate=-1"), 1, "speculate is", "expected")


def test_samples_of_one_prompt_and_the_choice_among_them(capsys) -> None:
    """The JSON has all samples, the first as without the flag; the text is that of the sample with the best mean."""
    argv = ["generate", "--prompt=One day", "--max_new_tokens=8", "--seed=3"]
    code, out, err = run(capsys, *argv, "--samples=3", "--json")
    made = json.loads(out)
    scores = [np.mean(sample["log_probabilities"]) for sample in made["samples"]]
    assert code == 0 and made["prompt"] == "One day" and len({sample["text"] for sample in made["samples"]}) == 3
    np.testing.assert_allclose([sample["mean_log_probability"] for sample in made["samples"]], scores)
    assert made["chosen"] == np.argmax(scores) and "votes" not in made and "answer" not in made["samples"][0]
    assert err.startswith(
        f"llamajax: sample {made['chosen'] + 1} of 3 is the likeliest, {max(scores):.3f} nats a token"
    )
    text = run(capsys, *argv, "--samples=3")[1]
    assert text == "One day" + made["samples"][made["chosen"]]["text"]
    assert run(capsys, *argv)[1] == "One day" + made["samples"][0]["text"]


def test_a_vote_of_several_prompts(capsys) -> None:
    """Each prompt's samples vote among themselves."""
    argv = ["generate", "--prompt=One day", "--prompt=At night the", "--max_new_tokens=8", "--json", "--samples=3"]
    code, out, err = run(capsys, *argv, "--vote")
    made = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [each["prompt"] for each in made] == ["One day", "At night the"]
    for each in made:
        answers = [sample["answer"] for sample in each["samples"]]
        assert sum(each["votes"].values()) == sum(answer is not None for answer in answers)
    assert err.count("likeliest") == 2


def test_a_prompt_from_a_file_and_from_standard_input(tmp_path: Path, capsys, monkeypatch) -> None:
    """The newline that editors and echo append is dropped."""
    argv = ["generate", "--max_new_tokens=8", "--seed=3"]
    expected = run(capsys, *argv, "--prompt=One day\nTom")[1]
    (tmp_path / "prompt.txt").write_bytes(b"One day\nTom\r\n")
    assert run(capsys, *argv, f"--prompt_file={tmp_path}/prompt.txt")[1] == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"One day\nTom\n")))
    assert run(capsys, *argv, "--prompt_file=-")[1] == expected
    asked = run(capsys, *argv, f"--prompt_file={tmp_path}/prompt.txt", "--think")[1]
    assert asked.startswith("One day\nTom\n\nLet's think step by step.")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--vote"], "--vote is given for one sample: expected several, such as --samples=8"),
        (
            ["--samples=2", "--temperature=0"],
            "--samples=2: at temperature 0 all samples are equal: expected --temperature",
        ),
        (["--prompt=a", "--prompt_file=b"], "--prompt and --prompt_file are both given: expected one of them"),
        (["--prompt_file=absent.txt"], "absent.txt"),
        (["--prompt_file=/dev/zero"], "/dev/zero"),
        (["--prompt_file=-"], "standard input: invalid start byte at byte 1: expected UTF-8 text"),
    ],
)
def test_samples_and_prompts_that_cannot_be(argv, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    assert_one_line_error(*run(capsys, "generate", *argv), 1, message)


def test_inspect_agrees_with_the_files(capsys) -> None:
    from safetensors import safe_open

    box = ROOT / "llamajax" / "box"
    code, out, _ = run(capsys, "inspect", "--model=box", "--json")
    summary = json.loads(out)
    with safe_open(box / "model.safetensors", framework="np") as tensors:
        sizes = [tensors.get_tensor(name).size for name in tensors.keys()]
    assert code == 0
    assert summary["parameters"] == sum(sizes) == sum(int(np.prod(t["shape"])) for t in summary["tensors"])
    assert summary["bytes"] == 2 * sum(sizes)
    code, out, _ = run(capsys, "inspect", "--model=box")
    assert code == 0 and "layers.*.attention.query_DQ" in out and f"{2 * sum(sizes):,}" in out


def test_convert_there_and_back(tmp_path: Path, capsys) -> None:
    from safetensors.numpy import load_file

    assert run(capsys, "convert", "--model=box", f"--output={tmp_path}/ours")[0] == 0
    argv = [f"--model={tmp_path}/ours", f"--output={tmp_path}/theirs", "--to=huggingface"]
    assert run(capsys, "convert", *argv)[0] == 0
    before = load_file(ROOT / "llamajax" / "box" / "model.safetensors")
    after = load_file(tmp_path / "theirs" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        np.testing.assert_array_equal(before[name].view(np.uint16), after[name].view(np.uint16))
    assert (tmp_path / "theirs" / "tokenizer.model").read_bytes() == (
        ROOT / "llamajax" / "box" / "tokenizer.model"
    ).read_bytes()


@pytest.mark.exhaustive
def test_eval_of_the_box(capsys) -> None:
    """The box must predict unseen stories far better than a uniform guess over its 2,048 tokens (7.6 nats)."""
    text = ROOT / "README.md"
    code, out, _ = run(capsys, "eval", "--model=box", "--context=256", "--json")
    result = json.loads(out)
    assert code == 0 and result["cross_entropy_nats"] < 1.0
    assert np.isclose(result["perplexity"], np.exp(result["cross_entropy_nats"]))
    code, out, _ = run(capsys, "eval", "--model=box", "--context=64", f"--text={text}", "--json")
    assert code == 0 and json.loads(out)["cross_entropy_nats"] > result["cross_entropy_nats"] + 1


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    """A folder with a tiny model, two that differ from it a little, one of another shape, and a text."""
    folder = tmp_path_factory.mktemp("small")
    for name, factor in (("whole", 1.0), ("close", 0.999), ("far", 0.9)):
        model = jax.tree.map(lambda leaf, factor=factor: leaf * factor, tiny_model)
        llamajax.save_checkpoint(model, folder / name, tokenizer=tiny_tokenizer)
    config = llamajax.Config.from_dict(tiny_model.config.to_dict() | {"num_layers": 1})
    shallow = llamajax.Llama(config, key=jax.random.key(0))
    llamajax.save_checkpoint(shallow, folder / "shallow", tokenizer=tiny_tokenizer)
    (folder / "text").write_text("A little fox had a red apple. <|endoftext|> He ate it by the river.\n" * 9)
    return folder


EVAL_KEYS = {
    *("model", "text", "convention", "context", "windows", "predictions", "products"),
    *("cross_entropy_nats", "cross_entropy_standard_error", "perplexity", "perplexity_standard_error"),
    *("bits_per_weight", "bytes_in_memory", "bytes_on_disk"),
}
REFERENCE_KEYS = {
    *("kl_divergence", "kl_standard_error", "kl_99th_percentile", "kl_max", "top1_agreement"),
    *("signal_to_noise_db", "reference"),
}


@pytest.mark.matrix
@pytest.mark.parametrize("convention", ["documents", "llama.cpp", "gptq"])
def test_eval_json(convention: str, small: Path, capsys) -> None:
    argv = [f"--text={small}/text", "--context=32", f"--convention={convention}", "--json"]
    code, out, err = run(capsys, "eval", f"--model={small}/far", f"--reference={small}/whole", *argv)
    assert code == 0 and err == ""
    result = json.loads(out, parse_constant=pytest.fail)
    assert set(result) == EVAL_KEYS | REFERENCE_KEYS
    scored = {"documents": 32, "llama.cpp": 15, "gptq": 31}[convention]
    assert result["predictions"] == scored * result["windows"] and result["windows"] > 5
    assert result["bits_per_weight"] == 32 and result["bytes_on_disk"] > result["bytes_in_memory"]
    assert 0 < result["kl_standard_error"] < result["kl_divergence"] < result["kl_99th_percentile"] <= result["kl_max"]
    noise = result["signal_to_noise_db"]
    assert len(noise["layers"]) == 2 and noise["embedding"] == pytest.approx(20, abs=1e-3)
    np.testing.assert_allclose(noise["weights"]["layers.*.attention.query_DQ"], [20, 20], atol=1e-3)
    alone = json.loads(run(capsys, "eval", f"--model={small}/whole", *argv)[1])
    assert set(alone) == EVAL_KEYS
    for key, value in result["reference"].items():
        assert value == (pytest.approx(alone[key], rel=1e-5) if isinstance(value, float) else alone[key])


def test_eval_prints_tables(small: Path, capsys, monkeypatch) -> None:
    """The reference and the model stand below each other in aligned columns, then the layers."""
    monkeypatch.chdir(small)
    argv = ["--reference=whole", "--text=text", "--context=32"]
    code, out, err = run(capsys, "eval", "--model=far", *argv)
    assert code == 0 and err == ""
    summary, layers = out.split("signal to noise by layer, dB")
    rows = [line for line in summary.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == ["whole", "far"]
    assert "32.00" in rows[0] and rows[0].count("±") == 1 and rows[1].count("±") == 2 and "%" in rows[1]
    assert len({len(line) for line in summary.splitlines()[1:] if line}) == 1
    lines = [line for line in layers.splitlines() if line.startswith("│")]
    assert [line.split()[1] for line in lines] == ["embedding", "0", "1", "logits"] and "20.00" in lines[1]
    assert "embed_VD 20.00" in " ".join(layers.split())
    code, out, _ = run(capsys, "eval", "--model=shallow", *argv)
    assert code == 0 and "the architectures differ" in out and "agreement" in out


def test_eval_of_several_models(small: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install 'llamajax[plot]'")
    monkeypatch.chdir(small)
    argv = ["--model=close,far,whole", "--reference=whole", "--text=text", "--context=32"]
    argv += [f"--plot={tmp_path}/curve.svg"]
    code, out, _ = run(capsys, "eval", *argv)
    rows = [line.split()[1] for line in out.splitlines() if line.startswith("│")]
    assert code == 0 and rows == ["whole", "close", "far", "whole"]
    picture = (tmp_path / "curve.svg").read_text()
    assert picture.count("<svg ") == 1 and all(f">{name}<" in picture for name in ("close", "far"))
    assert "whole: 32.00 bits, no divergence" in picture
    lines = run(capsys, "eval", *argv, "--json")[1].splitlines()
    results = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [result["model"] for result in results] == ["close", "far", "whole"]
    # JSON has no infinity: null is the ratio of a model to itself.
    assert results[2]["signal_to_noise_db"]["layers"] == [None, None] and results[2]["top1_agreement"] == 1
    close, far, whole = (result["kl_divergence"] for result in results)
    assert whole <= close < far


def test_eval_draws_layers(small: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install 'llamajax[plot]'")
    argv = [f"--model={small}/far", f"--reference={small}/whole", f"--text={small}/text", "--context=32"]
    assert run(capsys, "eval", *argv, f"--plot={tmp_path}/layers.svg")[0] == 0
    assert ">residual stream<" in (tmp_path / "layers.svg").read_text()
    assert run(capsys, "eval", *argv, f"--plot={tmp_path}/layers.png")[0] == 0
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    argv = [f"--model={small}/shallow", *argv[1:], f"--plot={tmp_path}/none.svg"]
    assert_one_line_error(*run(capsys, "eval", *argv), 1, "none.svg", "the architectures differ")


def test_eval_without_matplotlib_says_what_to_install(tmp_path: Path, capsys, monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    argv = ["--reference=box", f"--plot={tmp_path}/layers.svg"]
    assert_one_line_error(*run(capsys, "eval", *argv), 1, "matplotlib", "pip install 'llamajax[plot]'")


def test_eval_refuses_models_of_different_tokenizers(small: Path, capsys) -> None:
    argv = ["eval", f"--model={small}/whole,box", f"--text={small}/text", "--context=32"]
    assert_one_line_error(*run(capsys, *argv), 1, "box and ", "whole have different tokenizers")


def test_train_writes_a_model_that_generates(tmp_path: Path, capsys) -> None:
    config = tmp_path / "tiny.toml"
    config.write_text(
        "vocab_size = 400\nwidth = 32\nffn_width = 64\nnum_layers = 1\nnum_heads = 2\nnum_kv_heads = 1\n"
        "head_size = 16\ncontext_length = 64\ntied_embeddings = true\n"
    )
    argv = ["--stories=200", f"--config={config}", "--steps=4", "--batch=2", "--sequence_length=32", "--eval_every=2"]
    code, _, err = run(capsys, "train", *argv, f"--output={tmp_path}/run")
    assert code == 0, err
    assert "held-out" in err and (tmp_path / "run" / "loss.csv").read_text().count("\n") == 5
    assert run(capsys, "generate", f"--model={tmp_path}/run/model", "--max_new_tokens=5")[0] == 0
    code, out, err = run(capsys, "train", *argv, f"--output={tmp_path}/run")
    assert_one_line_error(code, out, err, 1, "exists already")


BAD_INPUT = {
    "missing file": (["generate", "--model=nowhere.bin"], 1, ["nowhere.bin", "no such file", "box"]),
    "preset without weights": (["generate", "--model=llama3-8b"], 1, ["preset", "without weights"]),
    "negative temperature": (["generate", "--temperature=-1"], 1, ["temperature is -1.0", "0 (greedy)"]),
    "top_p": (["generate", "--top_p=1.5"], 1, ["top_p is 1.5", "at most 1"]),
    "top_k": (["generate", "--top_k=0"], 1, ["top_k is 0", "from 1"]),
    "seed": (["generate", "--seed=-3"], 1, ["seed is -3", "from 0"]),
    "too many tokens": (["generate", "--max_new_tokens=9999"], 1, ["9999", "at most 512"]),
    "no tokens": (["generate", "--max_new_tokens=0"], 1, ["max_new_tokens is 0", "at least 1"]),
    "long prompt": (["generate", f"--prompt={'the bear ' * 600}"], 1, ["context only 512", "shorten"]),
    "empty stop": (["generate", "--stop="], 1, ["stop", "at least one character"]),
    "not a tokenizer": (["generate", f"--tokenizer={__file__}"], 1, ["not a sentencepiece model"]),
    "text file as model": (["inspect", f"--model={ROOT}/README.md"], 1, ["unknown format", "expected"]),
    "no output": (["convert", "--model=box"], 1, ["--output"]),
    "missing text": (["eval", "--text=nowhere.txt"], 1, ["nowhere.txt", "no such file"]),
    "bad context": (["eval", "--context=0"], 1, ["--context=0", "at least 1"]),
    "context too long": (["eval", "--context=513"], 1, ["--context=513: expected at most 512", "--context=512"]),
    "context too short": (["eval", "--context=2", "--convention=llama.cpp"], 1, ["window is 2", "at least 3"]),
    "no batch": (["eval", "--batch=0"], 1, ["--batch=0", "at least 1"]),
    "no model": (["eval", "--model=box,,box"], 1, ["--model=box,,box", "commas"]),
    "unknown convention": (
        ["eval", "--convention=ppl"],
        2,
        ["--convention=ppl: expected documents, llama.cpp or gptq"],
    ),
    "plot of nothing": (["eval", "--plot=layers.svg"], 1, ["--plot", "--reference=MODEL"]),
    "plot of a kind": (["eval", "--reference=box", "--plot=layers.pdf"], 1, ["layers.pdf", ".svg or .png"]),
    "plot into nowhere": (
        ["eval", "--reference=box", "--plot=no/layers.svg"],
        1,
        ["no/layers.svg", "folder that exists"],
    ),
    "bench of both": (["bench", "--model=box", "--shape=llama3.2-1b"], 1, ["--model and --shape", "one of them"]),
    "bench of no number": (["bench", "--batch=1,two"], 1, ["--batch=1,two", "numbers from 1"]),
    "activations of floats": (["generate", "--activations=int8"], 1, ["'int8'", "without quantized weights"]),
    "bench activations of floats": (
        ["bench", "--activations=bfloat16"],
        1,
        ["'bfloat16'", "without quantized weights"],
    ),
    "bench recipe without shape": (["bench", "--recipe=int8"], 1, ["--recipe", "--shape", "llamajax quantize"]),
    "bench of nothing": (
        ["bench", "--prefill=", "--context="],
        1,
        ["--prefill and --context are empty", "nothing to measure"],
    ),
    "bench dtype twice": (
        ["bench", "--shape=llama3.2-1b", "--recipe=float16", "--dtype=float32"],
        1,
        ["--dtype=float32", "--recipe=float16", "leave --dtype out"],
    ),
    "bench unknown shape": (["bench", "--shape=llama9"], 1, ["llama9", "expected one of"]),
    "bench context": (["bench", "--context=1024"], 1, ["1024 tokens", "at most 512, the context of box"]),
    "bench steps": (["bench", "--steps=0"], 2, ["--steps=0: expected an integer from 1 to 64"]),
    "bench plot of a kind": (["bench", "--plot=speed.pdf"], 1, ["speed.pdf", ".svg or .png"]),
    "train without output": (["train"], 1, ["--output is missing"]),
    "train on nothing": (["train", "--output=x", "--data=nowhere.txt"], 1, ["nowhere.txt", "no such file"]),
    "train unknown config": (["train", "--output=x", "--config=llama9"], 1, ["llama9", "expected"]),
    "train bad option": (["train", "--output=x", "--steps=0"], 1, ["steps is 0", "at least 1"]),
    "unknown command": (["generat"], 2, ["unknown command 'generat'", "did you mean 'generate'"]),
    "unknown flag": (
        ["generate", "--temprature=1"],
        2,
        ["unknown flag --temprature", "did you mean --temperature?", "generate --help"],
    ),
    "not a number": (["generate", "--temperature=hot"], 2, ["--temperature=hot: expected a number"]),
    "surplus argument": (["generate", "Once"], 2, ["unexpected argument 'Once'", "--flag=value"]),
    "unknown dtype": (["generate", "--dtype=int4"], 2, ["--dtype=int4: expected auto, float32, bfloat16 or float16"]),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_an_exit_code(name: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv, expected_code, parts = BAD_INPUT[name]
    assert_one_line_error(*run(capsys, *argv), expected_code, *parts)
    assert list(tmp_path.iterdir()) == [], "bad input must leave no file behind"


def test_existing_target_is_refused_before_any_work(tmp_path: Path, capsys) -> None:
    (tmp_path / "there").mkdir()
    result = run(capsys, "convert", "--model=nowhere.bin", f"--output={tmp_path}/there")
    assert_one_line_error(*result, 1, "exists already", "choose another")


# ---- Which commands there are ----------------------------------------------------------------------------------------

IN_ORDER = (
    *("generate", "chat", "inspect", "tokenize", "convert", "quantize", "eval", "bench", "plan", "train"),
    *("export", "verify", "run"),
)
TRANSLATE = """
SUMMARY, EXAMPLES = "say it in another language", ("llamajax translate",)
def define(values): pass
def run(values): print("traduit")
"""


def _install(folder: Path, distribution: str, commands: dict[str, str], **modules: str) -> None:
    """Writes what an installer leaves of a distribution: metadata, and modules beside it."""
    metadata = folder / f"{distribution}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"{name} = {module}" for name, module in sorted(commands.items())]
    (metadata / "entry_points.txt").write_text("\n".join(["[llamajax.commands]", *lines, ""]))
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of other people's packages on Python's path; modules imported from it are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_the_overview_has_our_commands_in_this_order(capsys) -> None:
    out = run(capsys, "--help")[1]
    assert tuple(COMMANDS) == IN_ORDER
    assert re.findall(r"^  (\w+)  ", out, flags=re.MULTILINE) == list(IN_ORDER)


def test_commands_are_found_by_installed_metadata(tmp_path: Path, monkeypatch) -> None:
    """Works without a checkout and in any order of the metadata; somebody else's pyproject.toml is not read."""
    modules = {name: command.module for name, command in COMMANDS.items()}
    _install(tmp_path / "site", "llamajax", modules)
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'theirs'\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    found = find_commands(tmp_path)
    assert tuple(found) == IN_ORDER and {name: command.module for name, command in found.items()} == modules
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert find_commands(tmp_path) == {}


def test_a_package_without_metadata_says_so(capsys, monkeypatch) -> None:
    monkeypatch.setattr("llamajax.cli.COMMANDS", {})
    assert_one_line_error(*run(capsys, "generate"), 1, "finds no commands", "with pip", "checkout")


def test_another_distribution_adds_a_command(site: Path, capsys, monkeypatch) -> None:
    _install(site, "theirs", {"translate": "theirs_cli", "zero": "theirs_cli"}, theirs_cli=TRANSLATE)
    monkeypatch.setattr("llamajax.cli.COMMANDS", find_commands())
    assert list(find_commands()) == [*IN_ORDER, "translate", "zero"] and "theirs_cli" not in sys.modules
    assert "  translate  say it in another language\n" in run(capsys, "--help")[1]
    assert run(capsys, "translate") == (0, "traduit\n", "")
    assert_one_line_error(*run(capsys, "transalte"), 2, "did you mean 'translate'?")


def test_commands_that_cannot_be_used_name_who_declared_them(site: Path, capsys, monkeypatch) -> None:
    """The overview names it too, and other commands work."""
    _install(site, "theirs", {"inspect": "theirs_cli", "translate": "theirs_cli"}, theirs_cli=TRANSLATE)
    missing = {"sing": "songs", "hum": "nowhere", "whistle": "tune"}
    _install(site, "songs", {**missing, "translate": "songs"}, songs="import not_here_at_all", tune="SUMMARY = ''")
    monkeypatch.setattr("llamajax.cli.COMMANDS", find_commands())
    errors = {
        "inspect": ["llamajax (llamajax.cli.inspect) and theirs (theirs_cli)", "uninstall the other"],
        "translate": ["songs (songs) and theirs (theirs_cli)", "uninstall the other"],
        "sing": ["songs of the distribution songs cannot be imported (No module named 'not_here_at_all')", "install"],
        "hum": ["nowhere of the distribution songs cannot be imported", "No module named 'nowhere'", "uninstall it"],
        "whistle": ["tune of the distribution songs has no EXAMPLES, define, run", "another version of songs"],
    }
    code, overview, err = run(capsys, "--help")
    assert code == 0 and err == "" and "  generate   continue a prompt" in overview
    for name, parts in errors.items():
        assert_one_line_error(*run(capsys, name), 1, f"command {name!r}", *parts)
        (line,) = [line for line in overview.splitlines() if line.startswith(f"  {name} ")]
        assert "cannot be used: " in line and all(part in line for part in parts)


def test_commands_are_not_imported_before_they_are_used() -> None:
    source = """
import sys
from llamajax.cli import main
assert main(["--version"]) == main(["inspect", "--help"]) == 0
print([name for name in sys.modules if name.split(".")[0] == "export" or name.startswith("llamajax.cli.")])
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {name.rpartition(".")[2] for name in eval(done.stdout.splitlines()[-1])}
    assert imported & set(IN_ORDER) == {"inspect"}


# ---- How a command ends ----------------------------------------------------------------------------------------------


def test_a_reader_that_leaves_is_no_error() -> None:
    """As in `llamajax inspect | head -0`: the pipe is closed before anything is printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "llamajax", "inspect"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == 0


def test_interrupt_is_one_line(capsys, monkeypatch) -> None:
    def interrupted(values):
        raise KeyboardInterrupt

    monkeypatch.setattr("llamajax.cli.inspect.run", interrupted)
    assert_one_line_error(*run(capsys, "inspect"), 130, "interrupted")


def test_a_bug_keeps_its_traceback(capsys, monkeypatch) -> None:
    def buggy(values):
        raise ValueError("not the user's fault")

    monkeypatch.setattr("llamajax.cli.inspect.run", buggy)
    with pytest.raises(ValueError, match="not the user's fault"):
        run(capsys, "inspect")


def test_quantize_writes_what_generate_and_inspect_read(tmp_path: Path, tiny_tokenizer, capsys) -> None:
    """Uses a model whose inputs are whole groups of 32.

    Its weights are so far apart that rounding activations to bfloat16 chooses the same tokens.
    """
    shape = {"width": 64, "ffn_width": 96, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_size": 32}
    config = llamajax.Config(vocab_size=tiny_tokenizer.vocab_size, context_length=512, **shape)
    drawn = llamajax.Llama(config, key=jax.random.key(0))
    model = jax.tree.map(lambda leaf: leaf * 8 if leaf.std() > 0 else leaf, drawn)
    llamajax.save_checkpoint(model, tmp_path / "floats", tokenizer=tiny_tokenizer)
    argv = [f"--model={tmp_path / 'floats'}", "--recipe=int4-g32", f"--output={tmp_path / 'q'}"]
    code, out, err = run(capsys, "quantize", *argv)
    assert code == 0 and out == "" and "bits a weight on disk, int4-g32" in err and err.count("\n") == 1, err
    code, out, _ = run(capsys, "inspect", f"--model={tmp_path / 'q'}")
    assert code == 0 and "int4-g32" in out
    summary = json.loads(run(capsys, "inspect", f"--model={tmp_path / 'q'}", "--backend=cpu", "--json")[1])
    norms = 5 * config.width
    assert summary["bits_per_weight"] == pytest.approx(4.5 + 27.5 * norms / config.num_parameters)
    products = {tensor["name"]: tensor["product"] for tensor in summary["tensors"]}
    assert products["layers.*.ffn.up_DF"] == products["head_VD"] == "cpu layout"
    assert products["norm.weight_D"] == "float"
    generate = ("generate", f"--model={tmp_path / 'q'}", "--max_new_tokens=4", "--temperature=0", "--prompt=One day")
    code, text, _ = run(capsys, *generate)
    assert code == 0 and text.startswith("One day") and len(text) > len("One day")
    assert run(capsys, *generate, "--activations=bfloat16")[:2] == (0, text)
    assert_one_line_error(*run(capsys, "quantize", *argv), 1, "exists already")


def test_quantize_with_a_calibration_text_leaves_only_its_output(tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        "[[rules]]\nweights = 'layers.attention.out_QD'\nscheme = 'int3'\ngroup_size = 64\nmethod = 'gptq'\n"
        "[[rules]]\nweights = '*'\nkeep = true\n"
    )
    argv = [f"--recipe={recipe}", "--calibration=stories", "--calibration_tokens=1024", f"--output={tmp_path / 'q'}"]
    code, _, err = run(capsys, "quantize", "--model=box", *argv)
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.toml", "q"]
    assert "int3-g64" in run(capsys, "inspect", f"--model={tmp_path / 'q'}")[1]
    box, tokenizer = llamajax.load("box")
    ids = encode_documents(tokenizer, story_texts(1000).training)
    second = 512 + int(np.argmax(ids[512:] == tokenizer.bos_id))  # where the first story behind 512 tokens begins
    expected = llamajax.quantize(box, recipe, calibration=np.stack([ids[:512], ids[second : second + 512]]))
    made = llamajax.load(tmp_path / "q")[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, made, expected))


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (
            ["--recipe=int4-g128-gptq"],
            1,
            "recipe int4-g128-gptq needs a text to run the model on: add --calibration=FILE",
        ),
        (["--recipe=calibrated"], 1, "recipe calibrated needs a text to run the model on: add --calibration=FILE"),
        (["--recipe=int4-g32", "--calibration=stories"], 1, "recipe int4-g32 does not use --calibration"),
        (["--bits=0.5", "--calibration=stories"], 1, "target_bpw is 0.5: expected bits per weight"),
        (["--bits=four"], 2, "bits"),
        (["--calibration=self", "--calibration_tokens=0"], 1, "--calibration_tokens=0: expected at least 512"),
        (["--recipe=int4-g128-gptq", "--calibration=none.txt"], 1, "none.txt: no such file"),
        (["--recipe=int4-g128-gptq", "--calibration=stories", "--calibration_tokens=9"], 1, "expected at least 512"),
    ],
)
def test_quantize_says_what_it_needs(tmp_path: Path, capsys, argv: list[str], code: int, message: str) -> None:
    argv = ["--model=box", f"--output={tmp_path / 'q'}", *argv]
    assert_one_line_error(*run(capsys, "quantize", *argv), code, message)
    assert not list(tmp_path.iterdir())


def test_bench_measures_what_was_asked_for(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("llamajax.cli.bench.memory_bandwidth", lambda: 2e9)
    monkeypatch.setattr("llamajax.cli.bench.product_rate", lambda config, dtype: 4e9)
    options = ["--prefill=9", "--context=3,9", "--batch=1,2", "--repeats=1", "--steps=1", "--cache_dtype=float32"]
    code, out, err = run(capsys, "bench", *options, "--json")
    result = json.loads(out)
    assert code == 0 and err == ""
    assert (result["model"], result["backend"], result["parameters"]) == ("box", jax.default_backend(), 3672320)
    assert result["bytes"] == 4 * 3672320 and result["cache_dtype"] == "float32"
    figures = result["figures"]
    asked = [("prefill", 1, 9), *(("decode", batch, context) for batch in (1, 2) for context in (3, 9))]
    assert [(each["phase"], each["batch"], each["tokens"]) for each in figures] == asked
    for each in figures:
        assert each["of_memory_bandwidth"] == pytest.approx(each["gigabytes_per_second"] / 2)
        assert each["of_product_rate"] == pytest.approx(each["gigaflops_per_second"] / 4)
        made = each["tokens"] if each["phase"] == "prefill" else each["batch"]
        assert each["tokens_per_second"] == pytest.approx(made / each["seconds"])
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install 'llamajax[plot]'")
    code, out, err = run(capsys, "bench", *options, f"--plot={tmp_path / 'speed.svg'}")
    assert code == 0 and err == ""
    assert out.startswith("box, 32.00 bits a weight: 3,672,320 weights, 14.01 MiB; cache float32")
    assert out.count("decode") == 4 and out.count("prefill") == 1
    assert "memory        2.0 GB/s" in out and "0 programs" in out, "all programs were compiled before"
    picture = (tmp_path / "speed.svg").read_text()
    assert "decode 2 rows at 9" in picture and "prefill 9" in picture and "tokens per second" in picture


def test_bench_of_a_shape(capsys, monkeypatch) -> None:
    """Random int4 weights of a small preset take as many bytes prepared as not."""
    monkeypatch.setattr("llamajax.cli.bench.memory_bandwidth", lambda: 2e9)
    options = ["--shape=box", "--prefill=", "--repeats=1", "--steps=1", "--json"]
    prepared, stored = (json.loads(run(capsys, "bench", *options, flag)[1]) for flag in ("--prepare", "--noprepare"))
    assert prepared["prepared"] and not stored["prepared"] and prepared["weights"] == "int4-g32"
    assert prepared["bytes"] == stored["bytes"] and 4.5 <= 8 * stored["bytes"] / stored["parameters"] < 4.6
    floats = json.loads(run(capsys, "bench", *options, "--recipe=float32")[1])
    assert floats["bytes"] == 4 * floats["parameters"]


def test_compiled_programs_are_kept_where_the_user_keeps_caches(tmp_path: Path) -> None:
    """Uses a process of its own: the folder is chosen once, when a command starts."""
    command = [sys.executable, "-m", "llamajax", "generate", "--prompt=a", "--max_new_tokens=2", "--temperature=0"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    base = {**kept, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    theirs = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    texts = set()
    for environment in (
        base,  # a second run from the cache: see test_generate.py; without a possible folder: test_compilation.py
        {**base, "XDG_CACHE_HOME": str(tmp_path / "unused"), **theirs},
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert len(done.stderr.splitlines()) <= 4, done.stderr  # newline, prefill, decode, compile
        texts.add(done.stdout)
    assert len(texts) == 1
    assert list((tmp_path / "cache" / "llamajax").glob("xla-*/*"))
    assert not (tmp_path / "unused").exists() and list((tmp_path / "mine").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="compiled programs are neither kept there .*: Not a directory"):
        assert not is_private(tmp_path / "file" / "llamajax" / "xla-1")


def test_a_value_is_no_request_for_help(capsys) -> None:
    argv = ["generate", "--max_new_tokens=2", "--temperature=0", "--prompt"]
    for value in ("-h", "--help"):
        code, out, _ = run(capsys, *argv, value)
        assert code == 0 and out.startswith(value) and "Examples:" not in out
    assert "Examples:" in run(capsys, "generate", "-h")[1] and "Examples:" in run(capsys, "generate", "-help")[1]


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    """A model of finite weights, so large that activations are not finite."""
    path = tmp_path_factory.mktemp("overflowing") / "model"

    def larger(name, leaf):
        return leaf * 1e30 if "ffn" in jax.tree_util.keystr(name) else leaf

    model = jax.tree_util.tree_map_with_path(larger, tiny_model)
    llamajax.save_checkpoint(model, path, tokenizer=tiny_tokenizer)
    return path


@pytest.mark.parametrize("options", [[], ["--json"], ["--reference=MODEL"], ["--reference=MODEL", "--json"]])
def test_eval_names_what_is_not_finite(options: list[str], overflowing: Path, small: Path, capsys) -> None:
    """With a reference that overflows too, all tokens would seem to agree."""
    argv = [f"--model={overflowing}", f"--text={small}/text", "--context=32"]
    result = run(capsys, "eval", *argv, *(option.replace("MODEL", str(overflowing)) for option in options))
    assert_one_line_error(*result, 1, "logits are not finite at token 1 of window 1 of", str(overflowing), "float32")


def test_eval_keeps_what_it_found_before_an_error(overflowing: Path, small: Path, capsys) -> None:
    argv = ["eval", f"--model={small}/whole,{overflowing}", f"--text={small}/text", "--context=32"]
    code, out, err = run(capsys, *argv, "--json")
    assert code == 1 and json.loads(out)["model"] == f"{small}/whole" and "not finite" in err
    code, out, err = run(capsys, *argv)
    assert code == 1 and "perplexity" in out and err.count("\n") == 1


def test_names_in_tables_are_no_markup(small: Path, tmp_path: Path, capsys) -> None:
    """Paths with brackets are printed as they are, not read as rich markup."""
    import shutil

    names = ["a[/2024]", "m[bold]", "m[red]"]
    for name in names:
        shutil.copytree(small / "whole", tmp_path / name)
    models = ",".join(str(tmp_path / name) for name in names)
    code, out, err = run(capsys, "eval", f"--model={models}", f"--text={small}/text", "--context=32")
    assert code == 0, err
    assert all(f"{tmp_path / name} " in out for name in names)
    assert str(tmp_path / names[0]) in run(capsys, "inspect", f"--model={tmp_path / names[0]}")[1]
    assert f"{tmp_path}/x  [/y]" in run(capsys, "inspect", f"--model={tmp_path}/x  [/y]")[2], "spaces must stay, too"


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (MemoryError(), ["out of memory", "smaller model"]),
        (RuntimeError("std::bad_alloc"), ["out of memory"]),
        (RuntimeError("can't start new thread"), ["out of memory"]),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), ["out of device memory"]),
        (
            ValueError("OUT_OF_RANGE: write: No space left on device [os_error_code='28']"),
            ["No space left", "make room"],
        ),
        (OSError(28, "No space left on device", "there"), ["there: No space left on device", "make room"]),
        (FileNotFoundError(2, "No such file or directory", "there"), ["there: No such file"]),
    ],
)
def test_a_full_machine_is_one_line(error: Exception, parts: list[str], capsys, monkeypatch) -> None:
    def fails(values):
        try:
            raise error
        except type(error) as cause:  # as libraries wrap it
            raise (error if isinstance(error, OSError) else RuntimeError("writing failed")) from cause

    monkeypatch.setattr("llamajax.cli.inspect.run", fails)
    assert_one_line_error(*run(capsys, "inspect"), 1, *parts)
