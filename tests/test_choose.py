"""Choosing among samples: the final answer of a text, votes, the likeliest sample."""

import math
import time

import pytest

from llamajax.generation.answers import final_answer
from llamajax.generation.choose import STEP_BY_STEP, best_of, vote, with_steps
from llamajax.generation.request import Completion


def _sample(text: str, *log_probabilities: float) -> Completion:
    return Completion(text, [7] * len(log_probabilities), list(log_probabilities), 3, "stop")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # The last number, in one spelling.
        ("5 + 3 = 8", "8"),
        ("1,000", "1000"),
        ("$1,000.00", "1000"),
        ("1000.0", "1000"),
        ("12,345,678 apples", "12345678"),
        ("1,2,3", "3"),
        ("007", "7"),
        (".50", "0.5"),
        ("It is 3.", "3"),
        ("x = 3/4", "0.75"),
        ("-0.0", "0"),
        ("is -5", "-5"),
        ("\u22123 degrees", "-3"),
        ("2-1", "1"),
        ("pages 5-10", "10"),
        ("50%", "50"),
        # A marked answer takes precedence.
        ("The answer is 6 x 14 = 84 pencils. I had 5.", "84"),
        ("The answer is 5 cups out of 10", "5"),
        ("the answer is: \\( 42 \\), I think, of 50", "42"),
        ("#### 420\nSo 7 of them.", "420"),
        ("**Answer:** 17 (not 18)", "17"),
        ("Answer:\n17\n\n18", "17"),
        ("The answer is 4. No, the answer is 5. 6 is wrong.", "5"),
        ("The answer is unclear... 12", "unclear"),
        ("The answer is Paris. It has 2 million people.", "paris"),
        # A letter is a choice, but the article "A" is not.
        ("The answer is (B) 17.", "B"),
        ("Answer: C", "C"),
        ("The answer is A cat.", "a cat"),
        # Boxes, as at the end of texts by models trained on mathematics.
        ("so \\boxed{5 \\text{ cups}} of 9", "5"),
        ("\\boxed{\\frac{1}{3}}", "1/3"),
        ("\\boxed{1} and then $\\boxed{12}$. The answer is 7", "12"),
        ("\\boxed{\\text{B}}", "B"),
        ("\\boxed{12", "12"),
        # No answer.
        ("I do not know", None),
        ("the answer is", None),
        ("", None),
        ("1/0", "1/0"),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "piece", ["answer is ", "\\boxed{", "1,", "-", "$", ".", "1", "answer is .", "answer \n", "1/"]
)
def test_long_texts_take_a_moment(piece):
    """No expression passes over a text more than a few times: 200,000 characters take well under a second."""
    begin = time.process_time()
    final_answer(piece * (200_000 // len(piece)))
    assert time.process_time() - begin < 5


def test_the_likeliest_has_the_best_mean():
    """The mean decides, not the sum, which favours short texts."""
    samples = [_sample("a", -1.0), _sample("b", -0.5, -0.7, -0.6), _sample("c", -0.4, -1.6), _sample("")]
    choice = best_of(samples)
    assert choice.index == 1 and choice.scores == pytest.approx((-1.0, -0.6, -1.0, -math.inf))
    assert choice.answers == () and choice.votes == []
    assert str(choice) == "sample 2 of 4 is the likeliest, -0.600 nats a token"
    assert best_of(samples[:1] * 3).index == 0


def test_a_vote_takes_the_likeliest_sample_of_the_commonest_answer():
    samples = [
        _sample("It is 12.", -0.1),
        _sample("So 1,700", -0.9),
        _sample("The answer is 1700.0.", -0.3),
        _sample("1700", -0.5),
        _sample("no idea", -0.01),
        _sample("12, no 13", -0.2),
    ]
    choice = vote(samples)
    assert choice.index == 2 and choice.answers == ("12", "1700", "1700", "1700", None, "13")
    assert choice.votes == [("1700", 3), ("12", 1), ("13", 1)]
    assert str(choice) == (
        "3 of 6 samples say 1700, 1 says 12, 1 says 13, 1 nothing: sample 3 is the likeliest of the first"
    )


def test_as_many_votes_are_decided_by_the_likeliest_sample():
    samples = [_sample("3", -0.5), _sample("4", -0.4), _sample("3", -0.6), _sample("4", -0.9), _sample("5", -0.1)]
    assert vote(samples).index == 1
    assert vote(samples).votes[0] == ("4", 2)
    assert str(vote([_sample(str(i), -1.0 - i) for i in range(7)])) == (
        "1 of 7 samples say 0, 1 says 1, 1 says 2, 1 says 3, 3 something else: sample 1 is the likeliest of the first"
    )


def test_without_any_answer_the_likeliest_is_chosen():
    choice = vote([_sample("hm", -2.0), _sample("well", -1.0)])
    assert choice.index == 1 and choice.votes == []
    assert str(choice) == "none of them names an answer: sample 2 of 2 is the likeliest, -1.000 nats a token"


def test_answers_may_be_looked_for_elsewhere():
    """Answers may be passed separately, for example what follows a model's thinking."""
    samples = [_sample("<think>5</think>7", -0.3), _sample("<think>7</think>8", -0.1), _sample("7", -0.2)]
    assert vote(samples).answers == ("7", "8", "7")
    assert vote(samples, ["7", "8", "8"]).index == 1


def test_a_prompt_that_asks_for_steps_ends_with_them():
    assert with_steps("What is 2 + 2?") == f"What is 2 + 2?\n\n{STEP_BY_STEP}"
