"""Records the cost of one request: tokens, forward passes, seconds and bytes."""

import dataclasses

from llamajax.generation.compilation import Compilations


@dataclasses.dataclass
class Speed(Compilations):
    """The cost of one request. Times include running programs only, not compiling.

    Attributes:
        prefill_tokens: the number of prompt tokens put into the cache, without padding.
        decode_tokens: the number of generated tokens of all rows.
        decode_steps: the number of forward passes that generated them.
        row_steps: with speculation, the sum of these passes over the rows that took part in each; 0 without.
        step_bytes: the bytes of weights and cache that one forward pass reads.
        prefill_chunks: the number of forward passes of the prefill.
        reused_tokens: the number of prompt tokens that an earlier request had left in the cache.
    """

    prefill_tokens: int = 0
    prefill_chunks: int = 0
    prefill_seconds: float = 0.0
    reused_tokens: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0
    row_steps: int = 0
    decode_seconds: float = 0.0
    step_bytes: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second of prefill; 0 if nothing was prefilled."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Generated tokens per second, all rows together; 0 if nothing was generated."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def tokens_per_step(self) -> float:
        """With speculation, the mean number of tokens per row and forward pass, at most `speculate` + 1; 0 without."""
        return self.decode_tokens / self.row_steps if self.row_steps else 0.0

    @property
    def prefill_gigabytes_per_second(self) -> float:
        """Bytes of weights and cache read per second, in 1e9."""
        return self.step_bytes * self.prefill_chunks / self.prefill_seconds / 1e9 if self.prefill_seconds else 0.0

    @property
    def decode_gigabytes_per_second(self) -> float:
        """Bytes of weights and cache read per second, in 1e9."""
        return self.step_bytes * self.decode_steps / self.decode_seconds / 1e9 if self.decode_seconds else 0.0
