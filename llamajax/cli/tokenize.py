"""`llamajax tokenize`: shows the token ids and pieces of a text, or the text of token ids."""

from absl import flags

from llamajax.cli.flag_groups import COMMON, group
from llamajax.cli.model_flags import define_model, define_parse_special, open_model
from llamajax.cli.standard_input import read_standard_input
from llamajax.cli.terminal import as_json, printable, write
from llamajax.errors import LlamaJaxError
from llamajax.files import shortened
from llamajax.tokenizer import Tokenizer

SUMMARY = "show the token ids and pieces of a text, or the text of token ids"
EXAMPLES = (
    "llamajax tokenize 'Once upon a time'",
    "llamajax tokenize --model=any-llama.gguf --parse_special '<|im_start|>user'",
    "llamajax tokenize --tokenizer=tokenizer.json --json < story.txt",
)
POSITIONAL = "text"


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    define_model(values)
    with group(values, COMMON):
        flags.DEFINE_string(
            "text",
            None,
            "Tokenizes `TEXT`; --text= may be left out. Without a text and without --ids, standard input is read.",
            flag_values=values,
        )
        flags.DEFINE_list(
            "ids", None, "Prints the text of these token ids, such as `1,403,407`, instead.", flag_values=values
        )
        flags.DEFINE_boolean(
            "bos",
            None,
            "Begins with the BOS token; --nobos begins without. Without either flag the model's files decide.",
            flag_values=values,
        )
        define_parse_special(values)
        flags.DEFINE_boolean("json", False, "Prints one JSON object: text, ids and pieces.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Prints an id and its piece per line, or the text of ids.

    Raises:
        LlamaJaxError: if there is no tokenizer, the text is not UTF-8, or --ids is not a list of its token ids.
    """
    tokenizer = _tokenizer(values)
    if values.ids is None:
        text = read_standard_input("tokenize the text in parts") if values.text is None else values.text
        ids = tokenizer.encode(text, bos=values.bos, special=values.parse_special)
    elif values.text is not None:
        raise LlamaJaxError("--ids and a text are both given: expected one of them")
    else:
        ids = [_number(word) for word in values.ids]
        text = tokenizer.decode(ids)
    pieces = [tokenizer.piece(index) for index in ids]
    if values.json:
        write(as_json({"text": text, "ids": ids, "pieces": pieces}))
    elif values.ids is not None:
        write(text)
    else:
        width = max(map(len, map(str, ids)), default=0)
        write("".join(f"{index:>{width}}  {printable(piece)}\n" for index, piece in zip(ids, pieces, strict=True)), "")


def _tokenizer(values: flags.FlagValues) -> Tokenizer:
    """The tokenizer of the model; if --tokenizer is given without --model, the tokenizer in that file."""
    if values.tokenizer is not None and not values["model"].present:
        return Tokenizer.from_file(values.tokenizer)
    return open_model(values)[1]


def _number(word: str) -> int:
    if not word.strip().isdecimal() or len(word) > 12:
        raise LlamaJaxError(f"--ids contains {shortened(word)}: expected whole numbers, separated by commas")
    return int(word)
