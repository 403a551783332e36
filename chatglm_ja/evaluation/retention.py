"""Chat retention: what became of the base's own answers in the languages that it knew.

Every stage is asked the same questions as the base. How likely does it still find the base's
answers, and does it answer as the base did: in the language, to an end, at such a length?

bits_per_char   cross entropy of the base's answer after its question, and of the token that ends
                it if the base came to an end, per character; of the base itself its own certainty
in_language     the share of the stage's own answers that are in the question's language
ended           the share that end before the limit of tokens
characters      their length

The answers are sampled, as a chat samples them. So what bits_per_char adds to the base's is an
estimate of how far the stage's answers have moved: of KL(base, stage), were they sampled at
temperature 1. Greedy answers of a small model are loops, which any model predicts.
"""

import math
from collections.abc import Sequence
from typing import Any

from chatglm_ja.bases.interface import FormatError, ModelTokenizer
from chatglm_ja.data import language_id
from chatglm_ja.evaluation.likelihood import Scorer, Window
from chatglm_ja.evaluation.paired import Baseline
from chatglm_ja.inference.generation import Answer
from chatglm_ja.messages import IGNORE_INDEX, Message

Conversation = Sequence[Message]


def measure_retention(
    kind: str,
    conversations: Sequence[Conversation],
    base: Sequence[Answer],
    own: Sequence[Answer],
    scorer: Scorer,
    baseline: Baseline,
) -> dict[str, Any]:
    """Measure the answers in one language; every entry is as Baseline.compare gives it.

    `base` and `own` are the answers of the base and of the stage to the conversations, each of
    which ends with the question. `in_language` is None for a language that cannot be told.
    """
    fits = language_id.in_language([answer.text for answer in own], kind)
    values = {
        "bits_per_char": score_answers(conversations, base, scorer),
        "in_language": fits,
        "ended": [answer.stopped for answer in own],
        "characters": [len(answer.text) for answer in own],
    }
    return {
        name: None
        if measured is None
        else baseline.compare(("retention", kind, name), [float(value) for value in measured])
        for name, measured in values.items()
    }


def score_answers(
    conversations: Sequence[Conversation], answers: Sequence[Answer], scorer: Scorer
) -> list[float]:
    """Return the bits per character of each answer to a conversation.

    NaN for an answer that is empty, or that the format cannot express.
    """
    windows = [
        _make_window(scorer.model.tokenizer, messages, answer, scorer.window)
        for messages, answer in zip(conversations, answers, strict=True)
    ]
    nats = iter(scorer.score_windows([w for w in windows if w], "the base's answers"))
    return [
        next(nats) / math.log(2) / len(answer.text) if window else math.nan
        for window, answer in zip(windows, answers, strict=True)
    ]


def _make_window(
    tokenizer: ModelTokenizer, messages: Conversation, answer: Answer, size: int
) -> Window | None:
    """Return the conversation's ids, and where the answer begins; the end of what is too long."""
    if not answer.text:
        return None
    try:
        ids, labels = tokenizer.build_example(
            [*messages, {"role": "assistant", "content": answer.text}]
        )
    except FormatError:
        return None
    start = len(tokenizer.build_prompt(messages))
    end = max(place for place, label in enumerate(labels) if label != IGNORE_INDEX)
    if answer.stopped:
        end += 1
    dropped = max(0, end - size)
    return tuple(ids[dropped:end]), max(1, start - dropped)
