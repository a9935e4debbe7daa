"""`llamajax chat` in a pseudo-terminal: a person types, stops answers, saves and loads; the test checks the screen."""

import json
import os
import re
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chat_models import CYCLE, answer, save_speller

pytest.importorskip("pty", reason="needs pseudo-terminals, which POSIX has")
pytest.importorskip("pyte", reason="needs pyte, an emulated terminal: pip install -e '.[test]'")
from llamajax.cli.chat_input import FileOfLines
from tests.pseudo_terminal import PseudoTerminal  # imports both

ROOT = Path(__file__).parents[1]
PROMPT = re.compile(r"^> ?$")


class Person(PseudoTerminal):
    """A person who converses, and waits for the prompt after each message."""

    # How much was shown, and how many prompts had begun, when the program last waited for input.
    _seen = 0
    _begun = 0

    def waits(self) -> str:
        """Returns what was shown since the last message, once the program waits for another."""
        seen = self.wait_for(self._is_asked, "prompt")
        since = seen[self._seen :]
        self._seen, self._begun = len(seen), self._prompts()
        return since

    def _is_asked(self, text: str) -> bool:
        """Returns whether another prompt is there; a line that is being redrawn may look like one for a moment."""
        begun = self._prompts() > self._begun if self._prompts() else len(text) > self._seen
        return begun and bool(PROMPT.match(text.rpartition("\n")[2]))

    def _prompts(self) -> int:
        """Returns how many prompts the terminal got: at each one, the program asks it to mark pasted text."""
        return self.written.count(b"\x1b[?2004h")

    def says(self, message: str) -> str:
        """Returns what is shown after a message."""
        return self.presses(f"{message}\r")

    def presses(self, keys: str) -> str:
        """Returns what is shown after keys, once the program waits for more."""
        self.type(keys)
        return self.waits()


@pytest.fixture(scope="module")
def speller(tmp_path_factory) -> Path:
    return save_speller(tmp_path_factory.mktemp("chat") / "speller", 16_384)


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    """Starts `llamajax chat` with flags, in a terminal of some size."""
    started = []

    def begin(*argv: str, term: str = "xterm", **size: int) -> Person:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TERM": term,
            "XDG_STATE_HOME": str(tmp_path / "state"),
        }
        person = Person([sys.executable, "-m", "llamajax", "chat", "--temperature=0", *argv], environment, **size)
        started.append(person)
        return person

    yield begin
    for person in started:
        person.close()


def saved(path: Path) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in json.loads(path.read_text())["messages"]]


def test_a_conversation(speller: Path, start, tmp_path: Path) -> None:
    person, file = start(f"--model={speller}", "--max_new_tokens=30"), tmp_path / "said.json"
    assert "speller, 16,384 tokens of context. /help lists" in person.waits()
    first = person.says("hello")
    assert answer(30) in first
    assert re.search(r"\n30 tokens, [\d,.]+ tokens/s, \d+ of 16,384 tokens of context \(stopped\sat\sthe\slimit", first)
    assert answer(30) in person.says('three quotes: """ and /slash')

    # Ctrl-C during an answer stops it, and the conversation goes on.
    assert "an answer has at most 12000 tokens" in person.says("/max_new_tokens 12000")
    person.type("long\r")
    person.wait_for(lambda text: CYCLE in text[person._seen :], "answer")
    assert not person.shows_keys()
    person.type("\x03")
    assert re.search(r"tokens of context \(stopped\)\n", person.waits())
    person.says("/max_new_tokens 20")
    assert f"\n{answer(20)}\n" in person.says("next")

    person.says(f"/save {file}")
    assert person.shows(f"{file}: saved 8 messages")
    messages = saved(file)
    assert [role for role, _ in messages] == ["user", "assistant"] * 4
    assert [content for _, content in messages[::2]] == ["hello", 'three quotes: """ and /slash', "long", "next"]
    stopped = messages[5][1]
    assert 27 < len(stopped) < 12_000 and stopped == answer(len(stopped))

    # Another answer replaces the last one.
    assert answer(20) in person.says("/retry")
    assert answer(20) not in person.says("/temperature 100") and "temperature is 100" in person.text()
    assert answer(20) not in person.says("/retry")
    person.says(f"/save {file}")
    assert saved(file)[:7] == messages[:7] and saved(file)[7][1] != answer(20)
    person.says("/temperature 0")

    assert "the system message: Be brief." in person.says("/system Be brief.")
    person.says("/reset")
    assert answer(20) in person.says("//path")
    person.says(f"/save {file}")
    assert saved(file) == [("system", "Be brief."), ("user", "/path"), ("assistant", answer(20))]
    person.says("/reset")
    loaded = person.says(f"/load {file}")
    assert f"> /path\n{answer(20)}" in loaded and "system: Be brief." in loaded
    assert answer(20) in person.says("again")

    for typed, shown in (
        ("/hlep", "unknown command '/hlep': did you mean /help?"),
        ("/temperature warm", "/temperature: 'warm': expected a number"),
        ("/temperature -1", "temperature is -1.0: expected 0 (greedy) or"),
        ("/save", "/save: no FILE is given: expected /save FILE"),
        ("/reset all", "/reset: unexpected argument 'all': expected /reset alone"),
        ("/think maybe", "/think: 'maybe': expected on or off"),
        (f"/save {speller}/manifest.json", "exists and is not a saved conversation: choose another name"),
        ("/load nowhere.json", "nowhere.json: cannot be read (No such file or directory)"),
        ("/top_p off", "top_p is off"),
        ("/help", "/retry generates another answer to the last message"),
    ):
        person.says(typed)
        assert person.shows(shown), typed
    person.type("\x04")
    assert person.end() == 0 and person.shows_keys()
    history = tmp_path / "state" / "llamajax" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert [json.loads(line) for line in history.read_text().splitlines()][:2] == [
        "hello",
        'three quotes: """ and /slash',
    ]


def test_a_narrow_terminal_and_a_full_window(tmp_path: Path, start) -> None:
    """Messages of several lines, text typed in another conversation, bytes that are no text, SIGTERM."""
    history = tmp_path / "state" / "llamajax" / "chat_history"
    history.parent.mkdir(parents=True)
    history.write_text('"/system typed before"\nnot JSON\n')
    speller, file = save_speller(tmp_path / "speller", 256), tmp_path / "said.json"
    person = start(f"--model={speller}", "--max_new_tokens=60", columns=24, lines=10)
    person.waits()
    person.says("\x1b[A")  # the arrow upwards
    assert person.shows("the system message: typed before")
    person.says("/system -")

    person.says('"""\ra\r""\r"""')
    person.says("one\\\rtwo\x1b\rthree")
    person.says("\x1b[200~pasted\nlines \\\nof it\x1b[201~")
    person.presses("dropped\x03")
    person.says("\udcff!")
    assert person.shows("the message was not sent: it contains bytes that are not UTF-8 text")
    assert person.says("   ").strip() == ">"
    person.says("/sav\t" + f" {file}")
    said = saved(file)
    assert [content for role, content in said if role == "user"] == [
        *('a\n""', "one\ntwo\nthree", "pasted\nlines \\\nof it"),
    ]
    assert [content for role, content in said if role == "assistant"] == [answer(60)] * 3
    assert not person.shows("left it")
    person.says("one too many")
    assert any(
        person.shows(f"the context holds 256 tokens: the oldest {turns} left it")
        for turns in ("turn has", "2 turns have", "3 turns have")
    )
    assert person.text().replace("\n", "").count(answer(26)) == 4 * answer(60).count(answer(26))

    person.type("half a message")
    person.wait_for(lambda text: text.endswith("message"), "echo")
    os.kill(person.process.pid, signal.SIGTERM)
    assert person.end() == 143 and person.shows_keys()
    assert person.text().endswith("llamajax: terminated")


def test_a_dumb_terminal(speller: Path, start) -> None:
    person = start(f"--model={speller}", "--max_new_tokens=30", "--nohistory", term="dumb")
    person.waits()
    assert answer(30) in person.says("hello")
    assert "temperature is 0.5" in person.says("/temperature 0.5")
    person.says("/max_new_tokens 12000")
    person.type("long\r")
    person.wait_for(lambda text: CYCLE in text[person._seen :], "answer")
    os.kill(person.process.pid, signal.SIGTERM)
    assert person.end() == 143 and person.shows_keys()
    assert person.text().endswith("llamajax: terminated") and b"\x1b" not in person.written


def test_what_is_remembered_is_bounded_and_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history"
    history = FileOfLines(path)
    assert list(history.load_history_strings()) == []
    for text in ("a\nb", "x" * 20_000, "\udcff"):
        history.store_string(text)
    assert list(FileOfLines(path).load_history_strings()) == ["\udcff", "a\nb"]
    path.write_text("".join(f'"{number}"\n' for number in range(2500)))
    assert list(history.load_history_strings()) == [str(number) for number in range(2499, 1499, -1)]
    assert path.read_text() == "".join(f'"{number}"\n' for number in range(1500, 2500))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    nowhere = FileOfLines(path / "below a file")
    nowhere.store_string("forgotten")
    assert list(nowhere.load_history_strings()) == []


@pytest.mark.extras
@pytest.mark.optimized
def test_smollm2_converses(smollm2: Path, start) -> None:
    person = start(f"--model={smollm2}")
    person.waits()
    assert "\nThe capital of France is Paris.\n" in person.says("What is the capital of France?")
    assert "\nThe capital of Italy is Rome.\n" in person.says("And of Italy?")
    person.type("Tell me a long story about a fox.\r")
    person.wait_for(lambda text: len(text) > person._seen + 100, "story")
    assert "(stopped)" in person.presses("\x03")
    assert "Tokyo" in person.says("What is the capital of Japan?")
    person.type("/exit\r")
    assert person.end() == 0
