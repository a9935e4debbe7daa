"""Chooses one of several samples as the answer, and asks a model for steps: both use more computing for better text.

Best of n takes the sample that the model itself finds likeliest, by the mean log probability of its tokens.
Self-consistency (Wang et al. 2022, arXiv:2203.11171) lets the samples vote by their final answers.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

from llamajax.generation.answers import final_answer
from llamajax.generation.request import Completion

# As the last line of a prompt or a message, it makes a model that does not think by itself show its steps (Kojima et
# al. 2022, arXiv:2205.11916).
STEP_BY_STEP = "Let's think step by step."


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen sample, and the reason.

    Attributes:
        index: the index of the chosen sample.
        scores: the mean log probability of each sample's tokens, in nats; minus infinity for a sample of no tokens.
        answers: the final answer of each sample, None if it has none; empty without a vote.
    """

    index: int
    scores: tuple[float, ...]
    answers: tuple[str | None, ...] = ()

    @property
    def votes(self) -> list[tuple[str, int]]:
        """Each answer and its number of samples, in descending order; among equals, the chosen answer comes first."""
        counts = Counter(answer for answer in self.answers if answer is not None)
        chosen = self.answers[self.index] if self.answers else None
        return sorted(counts.items(), key=lambda vote: (-vote[1], vote[0] != chosen))

    def __str__(self) -> str:
        """One line for people: the votes, or which sample was the likeliest."""
        number, score = self.index + 1, self.scores[self.index]
        if not self.votes:
            reason = "none of them names an answer: " if self.answers else ""
            return f"{reason}sample {number} of {len(self.scores)} is the likeliest, {score:.3f} nats a token"
        (answer, count), *others = self.votes
        parts = [f"{count} of {len(self.answers)} samples say {answer}"]
        parts += [f"{count} {'says' if count == 1 else 'say'} {answer}" for answer, count in others[:3]]
        if others[3:]:
            parts.append(f"{sum(count for _, count in others[3:])} something else")
        if silent := self.answers.count(None):
            parts.append(f"{silent} nothing")
        return f"{', '.join(parts)}: sample {number} is the likeliest of the first"


def with_steps(text: str) -> str:
    """Adds to a prompt or a message the request to answer step by step."""
    return f"{text}\n\n{STEP_BY_STEP}"


def best_of(completions: Sequence[Completion]) -> Choice:
    """Chooses the sample with the highest mean log probability per token; the first of equals."""
    scores = tuple(_mean_log_probability(completion) for completion in completions)
    return Choice(scores.index(max(scores)), scores)


def vote(completions: Sequence[Completion], texts: Sequence[str] | None = None) -> Choice:
    """Chooses the likeliest of the samples with the most frequent answer.

    Among answers with equal votes, that of the likeliest sample wins. If no sample has an answer, the likeliest of all
    samples is chosen.

    Args:
        completions: the samples.
        texts: the texts with the answers, for example without a model's thinking; defaults to `Completion.text`.
    """
    if texts is None:
        texts = [completion.text for completion in completions]
    likeliest = best_of(completions)
    answers = tuple(final_answer(text) for text in texts)
    counts = Counter(answer for answer in answers if answer is not None)
    most = max(counts.values(), default=0)
    leading = [i for i, answer in enumerate(answers) if counts.get(answer or "", 0) == most]
    return Choice(max(leading, key=lambda i: likeliest.scores[i]), likeliest.scores, answers)


def _mean_log_probability(completion: Completion) -> float:
    logs = completion.log_probabilities
    return math.fsum(logs) / len(logs) if logs else -math.inf
