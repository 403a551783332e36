"""What training data shares with evaluation texts is found, and cut out of long texts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatglm_ja.bases import families
from chatglm_ja.data import decontamination
from tests.conftest import demo_texts


@pytest.fixture(scope="module")
def tokenizer(merged_dir: Path) -> Any:
    return families.load_tokenizer(merged_dir)


def encode(tokenizer: Any, text: str) -> np.ndarray:
    (ids,) = tokenizer.encode_documents([text])
    return np.asarray(ids)


def test_thirteen_tokens_in_a_row_are_an_overlap(tokenizer: Any) -> None:
    evaluation = encode(
        tokenizer, "評価だけに使う独特な言い回しは訓練する文書のどこにも現れてはならない"
    )
    known = decontamination.hash_ngrams([evaluation], tokenizer)
    assert len(known) == len(evaluation) - 12
    noise = encode(tokenizer, "\n".join(demo_texts("en", 5)))
    assert not len(decontamination.find_overlaps(noise, known))
    for size, expected in ((13, [len(noise)]), (12, [])):
        ids = np.concatenate([noise, evaluation[1 : 1 + size], noise])
        assert decontamination.find_overlaps(ids, known).tolist() == expected
    assert not len(decontamination.find_overlaps(evaluation[:5], known))
    assert not len(decontamination.find_overlaps(noise, decontamination.load_overlap(None)))


@pytest.mark.parametrize(
    "text", ["-" * 200, "1234, 5678; " * 20, "| --- | --- |\n" * 20, "…。" * 60]
)
def test_digits_and_punctuation_are_no_overlap(tokenizer: Any, text: str) -> None:
    ids = encode(tokenizer, text)
    assert len(ids) > decontamination.OVERLAP_TOKENS
    assert not len(decontamination.hash_ngrams([ids], tokenizer))


def cut(tokenizer: Any, text: str, *evaluation: str) -> str | None:
    known = decontamination.hash_ngrams((encode(tokenizer, e) for e in evaluation), tokenizer)
    ids = encode(tokenizer, text)
    starts = decontamination.find_overlaps(ids, known)
    assert len(starts)
    return decontamination.cut_overlaps(text, ids, starts, tokenizer)


@pytest.mark.parametrize("language", ["ja", "zh", "en"])
def test_a_window_is_cut_not_a_novel(tokenizer: Any, language: str) -> None:
    pages = demo_texts(language, 60)
    novel, secret = "".join(pages[:40])[:20_000], "".join(pages[50:])[:300]
    half = len(novel) // 2
    rest = cut(tokenizer, novel[:half] + secret + novel[half:], secret)
    assert rest is not None
    assert rest.startswith(novel[: half - 260].strip()[:1000])
    assert rest.endswith(novel[half + 260 :].strip()[-1000:])
    assert len(novel) - len(rest) == pytest.approx(2 * 200, abs=60)
    known = decontamination.hash_ngrams([encode(tokenizer, secret)], tokenizer)
    assert not len(decontamination.find_overlaps(encode(tokenizer, rest), known))


def test_a_text_that_would_lose_too_much_is_dropped(tokenizer: Any) -> None:
    secret = "".join(demo_texts("ja", 60)[50:])[:300]
    novel = "".join(demo_texts("en", 60))
    assert cut(tokenizer, secret + novel[:500], secret) is None  # most of it
    many = "".join(novel[i : i + 2_000] + secret for i in range(0, 22_000, 2_000))
    assert cut(tokenizer, many, secret) is None  # eleven places
    assert cut(tokenizer, many[: 10 * 2_300], secret) is not None
