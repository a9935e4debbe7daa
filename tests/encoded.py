"""The two classes `Text` of the runners, in Python and in JavaScript, against a tokenizer."""

import json
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import export.vocabulary
from export.runners.text import Text
from export.vocabulary import TEXTS, vocabulary_of
from llamajax import Tokenizer

PAGE = Path(export.vocabulary.__file__).parent / "runners" / "web" / "llama.js"
STORY = "Once upon a time, there was a little fox named Ted.\nHe found 12 red apples; 'May I?' asked the café's owl. "


class Folder:
    """The part of a bundle that `Text` reads."""

    def __init__(self, path: Path, values: dict):
        self.path = path
        (path / "vocabulary.json").write_text(json.dumps(values))

    def file(self, name: str) -> Path:
        return self.path / name


def drawn_texts(count: int = 300, seed: int = 5) -> list[str]:
    """Returns random short texts that mix all kinds of characters, with a seed other than that of the golden texts."""
    draw = random.Random(seed)
    words = [*"ae▁é日🦊\n\x00 ", "aa", "the", "  ", "<|im_end|>", "<s>", "e\u0301", "12", "Once", "'LL", "'ſ", "\r\n"]
    code = lambda *ranges: chr(draw.randrange(*draw.choice(ranges)))  # noqa: E731
    kinds: list[Callable[[], str]] = [
        lambda: draw.choice(words),
        lambda: code((32, 127)),
        lambda: draw.choice("\n\t\r\x0b\x1c\x85\u00a0\u1680\u2003\u2028\u200b\u3000\ufeff▁ﬁ①\u0345\u0301"),
        lambda: code((0xA0, 0x600), (0x900, 0x1200), (0x1E00, 0x2200)),
        lambda: code((0x3000, 0x3200), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0x1F000, 0x1FA00)),
        lambda: code((0, 0xD800), (0xE000, 0x20000), (0xE000, 0x110000)),
    ]
    texts = []
    for _ in range(count):
        likely = [draw.random() ** 2 for _ in kinds]
        texts.append("".join(make() for make in draw.choices(kinds, likely, k=draw.randrange(30))))
    return [*texts, STORY, "  " + STORY + "  "]


def assert_same(
    tokenizer: Tokenizer,
    folder: Path,
    expected: Callable[[str], Sequence[int]] | None = None,
    texts: Sequence[str] | None = None,
) -> None:
    """Compares Python's and the page's `Text` with a tokenizer, or with the function that gives the expected ids."""
    values = vocabulary_of(tokenizer).values
    assert values["refusal"] is None
    runner, texts = Text(Folder(folder, values)), [*TEXTS, *drawn_texts()] if texts is None else texts
    # `Text` also reads special tokens in some of them.
    some = [] if expected else texts[: len(TEXTS) + 300]
    wanted = [list(expected(text) if expected else tokenizer.encode(text)) for text in texts]
    wanted += [tokenizer.encode(text, special=True) for text in some]
    found = [runner.encode(text) for text in texts] + [runner.encode(text, True) for text in some]
    assert [(text, a, b) for text, a, b in zip([*texts, *some], found, wanted, strict=True) if a != b] == []
    if shutil.which("node"):
        found = by_node(folder, [*texts, *some], f"texts.map((text, i) => runner.encode(text, i >= {len(texts)}))")
        assert [(text, a, b) for text, a, b in zip([*texts, *some], found, wanted, strict=True) if a != b] == []


def by_node(folder: Path, texts: Sequence[str], method: str = "texts.map((text) => runner.encode(text))") -> list:
    (folder / "texts.json").write_text(json.dumps(texts))
    script = (
        f"import {{ readFileSync }} from 'node:fs'; import {{ Text }} from '{PAGE.as_uri()}';"
        "const [vocabulary, texts] = process.argv.slice(1).map((file) => JSON.parse(readFileSync(file)));"
        f"const runner = new Text(vocabulary); console.log(JSON.stringify({method}));"
    )
    command = ["node", "--no-warnings", "--input-type=module", "--experimental-default-type=module", "-e", script]
    files = [str(folder / name) for name in ("vocabulary.json", "texts.json")]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
