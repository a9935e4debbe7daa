"""Windows: the pieces of a text that a model is shown, and which of its predictions count.

Perplexities are comparable only if the text is cut in the same way. Three conventions are in use:

    documents   Windows of n inputs that do not overlap, each with the n targets that follow its inputs. Every token of
                the text except the first is predicted once. Each document is encoded by itself, with BOS before it, and
                the results are joined.
    llama.cpp   As in tools/perplexity/perplexity.cpp of llama.cpp: the whole file is encoded at once after a BOS and
                cut into chunks of n tokens. BOS replaces the first token of each chunk. Positions n/2 to n - 2 are
                scored, n - 1 - n/2 predictions per chunk. Published results use n = 512.
    gptq        As in llama.py of IST-DASLab/gptq, and later AWQ, OmniQuant, QuIP# and AQLM: the whole text is encoded
                at once after a BOS and cut into windows of n tokens; the n - 1 after the first of each are predicted.
                Published results use n = 2048; AQLM's use 4096 (Llama 2) and 8192 (Llama 3).

`evaluate.text_windows` prepares a text for each.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llamajax.errors import LlamaJaxError

CONVENTIONS = ("documents", "llama.cpp", "gptq")


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """A text as independent rows for a model, and which of its predictions count.

    Attributes:
        rows: int32 [n, T+1]: the inputs are the first T tokens of a row, the targets the last T.
        first: the predictions of inputs `first` to T - 1 of each row count.
    """

    rows: np.ndarray
    first: int = 0

    @property
    def predictions(self) -> int:
        """How many predictions count, in all rows."""
        return len(self.rows) * (self.rows.shape[1] - 1 - self.first)

    def batches(self, batch: int, on_batch: Callable[[int, int], None]) -> Iterator[tuple[np.ndarray, int]]:
        """Yields [batch, T+1] rows and how many of them count.

        The last row is repeated to fill the last batch, so that it needs no program of its own. After each batch
        `on_batch` is called with (rows done, rows in all).
        """
        if batch < 1:
            raise LlamaJaxError(f"batch is {batch}: expected at least 1")
        for start in range(0, len(self.rows), batch):
            rows = self.rows[start : start + batch]
            yield np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)]), len(rows)
            on_batch(min(start + batch, len(self.rows)), len(self.rows))


def document_windows(tokens: Sequence[int] | np.ndarray, window: int) -> Windows:
    """Cuts ids into windows of `window` inputs: all tokens except the very first are predicted, each once.

    Tokens that do not fill a last window are left out.

    Raises:
        LlamaJaxError: if the text is shorter than one window and its last target.
    """
    tokens, count = _checked(tokens, window, least=1, overlap=1)
    return Windows(np.stack([tokens[i * window : (i + 1) * window + 1] for i in range(count)]))


def llama_cpp_windows(tokens: Sequence[int] | np.ndarray, window: int, bos_id: int | None) -> Windows:
    """Cuts ids into llama.cpp's chunks of `window` tokens, of which the second half is scored.

    Args:
        tokens: ids of the whole text, [n], beginning with BOS.
        window: n_ctx, tokens per chunk.
        bos_id: replaces the first token of each chunk; None for a model without BOS.

    Raises:
        LlamaJaxError: if the text is shorter than one chunk. (llama.cpp requires two.)
    """
    tokens, count = _checked(tokens, window, least=3)
    rows = tokens[: count * window].reshape(count, window).copy()
    if bos_id is not None:
        rows[:, 0] = bos_id
    return Windows(rows, first=window // 2)


def gptq_windows(tokens: Sequence[int] | np.ndarray, window: int) -> Windows:
    """Cuts ids into the GPTQ convention's windows of `window` tokens: the `window - 1` after the first are predicted.

    Raises:
        LlamaJaxError: if the text is shorter than one window.
    """
    tokens, count = _checked(tokens, window, least=2)
    return Windows(tokens[: count * window].reshape(count, window))


def as_windows(tokens: Sequence[int] | np.ndarray | Windows, window: int) -> Windows:
    """Returns windows unchanged, and cuts ids by `document_windows`."""
    return tokens if isinstance(tokens, Windows) else document_windows(tokens, window)


def _checked(
    tokens: Sequence[int] | np.ndarray, window: int, *, least: int, overlap: int = 0
) -> tuple[np.ndarray, int]:
    """Returns the ids as int32, and how many windows they fill if each shares `overlap` tokens with the next."""
    if window < least:
        raise LlamaJaxError(f"window is {window}: expected at least {least}")
    tokens = np.asarray(tokens, np.int32)
    count = (len(tokens) - overlap) // window
    if count < 1:
        raise LlamaJaxError(
            f"the text has {len(tokens)} tokens: expected at least {window + overlap}, one window of {window}"
        )
    return tokens, count
