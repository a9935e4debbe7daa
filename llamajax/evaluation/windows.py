"""Windows: the pieces of a text that a model is shown, and which of its predictions count.

Perplexities compare only where a text is cut alike. Three conventions are in use:

    documents   Windows of n inputs that do not overlap, each with the n targets that follow its inputs. Every token of
                the text but the first is predicted once. Documents are encoded one by one, BOS before each, and joined.
    llama.cpp   As its tools/perplexity/perplexity.cpp: the whole file is encoded at once behind a BOS and cut into
                chunks of n tokens, in each of which the first gives way to BOS; positions n/2 to n - 2 are scored, that
                is n - 1 - n/2 predictions a chunk. Published at n = 512.
    gptq        As llama.py of IST-DASLab/gptq, and after it AWQ, OmniQuant, QuIP# and AQLM: the whole text is encoded
                at once behind a BOS and cut into windows of n tokens, the n - 1 after the first of each are predicted.
                Published at n = 2048; by AQLM at 4096 (Llama 2) and 8192 (Llama 3).

`evaluate.text_windows` prepares a text for each.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llamajax.errors import LlamaJaxError

CONVENTIONS = ("documents", "llama.cpp", "gptq")


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """A text as it is shown to a model: rows that do not know of each other, and which predictions count.

    Attributes:
        rows: int32 [n, T+1]: T inputs, and the targets one further.
        first: position of the first input of a row whose prediction counts; those from there to T - 1 do.
    """

    rows: np.ndarray
    first: int = 0

    @property
    def predictions(self) -> int:
        """How many predictions count, in all rows."""
        return len(self.rows) * (self.rows.shape[1] - 1 - self.first)

    def batches(self, batch: int, on_batch: Callable[[int, int], None]) -> Iterator[tuple[np.ndarray, int]]:
        """Yields [batch, T+1] rows and how many of them count: the last row is repeated to fill the last batch.

        So the last batch needs no program of its own. Calls `on_batch` with (rows done, rows in all) behind each.
        """
        if batch < 1:
            raise LlamaJaxError(f"batch is {batch}: expected at least 1")
        for start in range(0, len(self.rows), batch):
            rows = self.rows[start : start + batch]
            yield np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)]), len(rows)
            on_batch(min(start + batch, len(self.rows)), len(self.rows))


def document_windows(tokens: Sequence[int] | np.ndarray, window: int) -> Windows:
    """Windows of `window` inputs: all tokens but the very first are predicted, each once.

    What does not fill a last window is left out.

    Raises:
        LlamaJaxError: if the text is shorter than one window and its last target.
    """
    tokens, count = _checked(tokens, window, least=1, overlap=1)
    return Windows(np.stack([tokens[i * window : (i + 1) * window + 1] for i in range(count)]))


def llama_cpp_windows(tokens: Sequence[int] | np.ndarray, window: int, bos_id: int | None) -> Windows:
    """llama.cpp's chunks of `window` tokens, of which the second half is scored.

    Args:
        tokens: ids of the whole text, [n], BOS in front.
        window: n_ctx, tokens a chunk.
        bos_id: takes the place of each chunk's first token; None for a model that wants no BOS.

    Raises:
        LlamaJaxError: if the text is shorter than one chunk. (llama.cpp wants two.)
    """
    tokens, count = _checked(tokens, window, least=3)
    rows = tokens[: count * window].reshape(count, window).copy()
    if bos_id is not None:
        rows[:, 0] = bos_id
    return Windows(rows, first=window // 2)


def gptq_windows(tokens: Sequence[int] | np.ndarray, window: int) -> Windows:
    """The GPTQ family's windows of `window` tokens: each predicts the `window - 1` behind its first.

    Raises:
        LlamaJaxError: if the text is shorter than one window.
    """
    tokens, count = _checked(tokens, window, least=2)
    return Windows(tokens[: count * window].reshape(count, window))


def as_windows(tokens: Sequence[int] | np.ndarray | Windows, window: int) -> Windows:
    """Windows as they are; ids cut by `document_windows`."""
    return tokens if isinstance(tokens, Windows) else document_windows(tokens, window)


def _checked(
    tokens: Sequence[int] | np.ndarray, window: int, *, least: int, overlap: int = 0
) -> tuple[np.ndarray, int]:
    """Ids as int32, and how many windows they fill, a window sharing `overlap` tokens with the next."""
    if window < least:
        raise LlamaJaxError(f"window is {window}: expected at least {least}")
    tokens = np.asarray(tokens, np.int32)
    count = (len(tokens) - overlap) // window
    if count < 1:
        raise LlamaJaxError(
            f"the text has {len(tokens)} tokens: expected at least {window + overlap}, one window of {window}"
        )
    return tokens, count
