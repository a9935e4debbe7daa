"""`--help`: every flag once and under a heading, examples that parse, pages that fit; and the nearest spelling."""

import importlib
import os
import re
import shlex

import pytest
from absl import flags

from llamajax.cli import COMMANDS, help_pages, main, terminal
from llamajax.cli.command_line import parse
from llamajax.cli.flag_groups import COMMON, flags_of, group, grouped

commands = pytest.mark.parametrize("name", COMMANDS)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def defined(name: str) -> tuple[flags.FlagValues, object]:
    """Returns a command's flags, not parsed yet, and its module."""
    module = importlib.import_module(COMMANDS[name].module)
    values = flags.FlagValues()
    module.define(values)
    flags.DEFINE_boolean("help", False, "", flag_values=values)
    return values, module


@commands
def test_every_flag_stands_once_under_a_heading(name: str, capsys) -> None:
    code, out, err = run(capsys, name, "--help")
    values, _ = defined(name)
    assert code == 0 and err == "" and out.startswith(f"llamajax {name}: ")
    shown = re.findall(r"^  --(?:\[no\])?(\w+)", out, flags=re.MULTILINE)
    assert sorted(shown) == sorted(flag.name for flag in flags_of(values))
    headings = re.findall(r"^(\S.*):$", out, flags=re.MULTILINE)
    assert headings[:2] == ["Examples", COMMON] and "Other" not in headings
    assert len(set(headings)) == len(headings) == 1 + len(grouped(values))
    assert 3 <= len(grouped(values)[COMMON]) <= 8


@commands
def test_texts_are_sentences_and_values_have_names(name: str, capsys) -> None:
    values, _ = defined(name)
    for flag in flags_of(values):
        text = re.sub(r"^<[^>]*>: ", "", flag.help.split(";\n")[0])
        assert re.match(r"[A-Z0-9`]|[a-z0-9]+ ", text), (flag.name, text)
        assert text.endswith((".", ":")), (flag.name, text)
    out = run(capsys, name, "--help")[1]
    assert "=VALUE" not in out and "`" not in out


@commands
def test_three_examples_that_parse(name: str) -> None:
    """Only the command's own arguments are parsed, not what is piped into it."""
    module = defined(name)[1]
    assert len(module.EXAMPLES) == 3  # type: ignore[attr-defined]
    for example in module.EXAMPLES:  # type: ignore[attr-defined]
        program, command, *arguments = shlex.split(example.rpartition("| ")[2].partition(" < ")[0])
        assert (program, command) == ("llamajax", name)
        values, _ = defined(name)
        parse([command, *arguments], module, values)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tokenize", "plan"])
def test_examples_that_need_no_file_run(name: str, capsys) -> None:
    values, module = defined(name)
    example = module.EXAMPLES[{"tokenize": 0, "plan": 1}[name]]  # type: ignore[attr-defined]
    code, out, _ = run(capsys, *shlex.split(example)[1:])
    assert code == 0 and out


class Terminal:
    """Makes standard output a terminal of some width."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
        monkeypatch.setattr(help_pages, "is_terminal", lambda stream: True)
        monkeypatch.setattr(terminal, "is_terminal", lambda stream: True)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        size = os.terminal_size((columns, 24))
        monkeypatch.setattr(help_pages.shutil, "get_terminal_size", lambda: size)


@pytest.mark.parametrize(("columns", "widest"), [(30, 60), (72, 72), (300, 100), (None, 100)])
def test_pages_are_as_wide_as_the_terminal(columns: int | None, widest: int, capsys, monkeypatch) -> None:
    """Pages have 60 to 100 columns; examples and long paths are not wrapped."""
    if columns:
        Terminal(monkeypatch, columns)
    for name in COMMANDS:
        page = run(capsys, name, "--help")[1]
        lines = re.sub(r"\x1b\[\d+m", "", page).splitlines()
        text = [line for line in lines if not line.startswith("  llamajax") and " | llamajax" not in line]
        assert max(map(len, text)) <= widest, max(text, key=len)
        assert max(map(len, lines)) <= 100, max(lines, key=len)
    assert max(len(line) for line in run(capsys, "--help")[1].splitlines()) <= 100


def test_only_a_terminal_gets_bold_headings(capsys, monkeypatch) -> None:
    assert "\x1b" not in run(capsys, "generate", "--help")[1] + run(capsys)[1]
    Terminal(monkeypatch, 80)
    assert "\x1b[1mCommon:\x1b[0m\n" in run(capsys, "generate", "--help")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run(capsys, "generate", "--help")[1]


def test_llamajax_alone_says_what_to_try_first(capsys) -> None:
    code, out, err = run(capsys)
    assert code == 2 and err == "" and len(out.splitlines()) < 15
    assert "llamajax generate --prompt='Once upon a time'" in out and "llamajax --help" in out


def test_help_of_a_command_is_asked_for_in_three_ways(capsys) -> None:
    pages = {run(capsys, *argv) for argv in (("plan", "--help"), ("help", "plan"), ("--help", "plan"))}
    assert len(pages) == 1 and next(iter(pages))[0] == 0
    assert run(capsys, "help", "plna")[2] == "llamajax: unknown command 'plna': did you mean 'plan'?\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generat"], "unknown command 'generat': did you mean 'generate'?"),
        (["quant"], "unknown command 'quant': did you mean 'quantize'?"),
        (["zzz"], "unknown command 'zzz': expected generate, chat, inspect"),
        (["--model=box"], "--model=box: expected a command before the flags, such as llamajax generate"),
        (["--versoin"], "unknown flag --versoin: did you mean --version?"),
        (["generate", "--promt=a"], "unknown flag --promt: did you mean --prompt? (see llamajax generate --help)"),
        (["generate", "--max-new-tokens=4"], "unknown flag --max-new-tokens: did you mean --max_new_tokens?"),
        (["generate", "--noecco"], "unknown flag --noecco: did you mean --noecho?"),
        (["generate", "--temp=1"], "unknown flag --temp: did you mean --temperature?"),
        (["generate", "--zzz=1"], "unknown flag --zzz (see llamajax generate --help)"),
        (["generate", "--dtype=floet32"], "--dtype=floet32: expected auto, float32, bfloat16 or float16; did you mean"),
        (["generate", "--samples=0"], "--samples=0: expected a positive integer"),
        (["generate", "--json=maybe"], "--json=maybe: expected --json or --nojson"),
        (["generate", "--noecho=3"], "--noecho=3 does not take an argument"),
        (["generate", "--prompt"], "--prompt: no value is given: expected --prompt=VALUE"),
        (["bench", "--steps=90"], "--steps=90: expected an integer from 1 to 64"),
        (["verify", "a", "b"], "unexpected argument 'b': expected --flag=value"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_the_nearest_spelling(argv: list[str], message: str, capsys) -> None:
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and err.startswith(f"llamajax: {message}") and err.count("\n") == 1, err


def test_flags_of_others_without_a_heading_stand_under_other() -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("mine", None, "A `THING` of another distribution.", flag_values=values)
    with group(values, "Last"):
        flags.DEFINE_alias("again", "mine", flag_values=values)
        flags.DEFINE_integer("number", 3, "Takes `N`.", flag_values=values)
    found = {heading: [flag.name for flag in members] for heading, members in grouped(values).items()}
    assert found == {"Last": ["number"], "Other": ["mine"]}
