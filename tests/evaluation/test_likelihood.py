"""Log-likelihoods against direct computations, for any window and batch size."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from chatglm_ja.bases import loading
from chatglm_ja.errors import DataError
from chatglm_ja.evaluation import likelihood
from chatglm_ja.evaluation.likelihood import Scorer
from chatglm_ja.inference.models import LoadedModel
from tests.conftest import demo_texts


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text[:150] for language in ("ja", "zh") for text in demo_texts(language, 5)]


def test_bits_per_character_follow_the_definition(model: LoadedModel, texts: list[str]) -> None:
    bits = 0.0
    for text in texts:
        prefix, ids = model.tokenizer.prefix, model.tokenizer.encode(text)
        with torch.inference_mode():
            logits = model.model(torch.tensor([prefix + ids])).logits[0].double()
        for position, token in enumerate(ids, start=len(prefix)):
            bits -= logits[position - 1].log_softmax(dim=-1)[token].item() / math.log(2)
    score = Scorer(model, window=1024, batch_size=3).score_texts(texts)
    assert score.characters == sum(map(len, texts))
    assert score.tokens == sum(len(model.tokenizer.encode(text)) for text in texts)
    assert score.bits_per_char == pytest.approx(bits / score.characters, rel=1e-6)
    assert score.bytes == len("".join(texts).encode())
    assert score.bits_per_byte == pytest.approx(bits / score.bytes, rel=1e-6)


def test_batch_size_changes_nothing(model: LoadedModel, texts: list[str]) -> None:
    scores = [
        Scorer(model, window=64, batch_size=size).score_texts(texts).bits_per_char
        for size in (1, 4, 32)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-5)


def test_window_size_changes_nothing_for_short_texts(model: LoadedModel, texts: list[str]) -> None:
    longest = 2 + max(len(model.tokenizer.encode(text)) for text in texts)
    scores = [
        Scorer(model, window, 4).score_texts(texts).bits_per_char
        for window in (longest, longest + 100, 2048)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-5)


def test_long_texts_are_scored_with_a_sliding_window(model: LoadedModel) -> None:
    """Compare token by token: each sees its window, as in the picture in the module."""
    (text,) = demo_texts("zh", 1)
    ids = [*model.tokenizer.prefix, *model.tokenizer.encode(text[:120])]
    size, nats = 16, 0.0
    starts = [0]  # where each window begins: half a window before the end of the last
    while starts[-1] + size < len(ids):
        starts.append(starts[-1] + size - size // 2)
    for place in range(2, len(ids)):
        start = next(s for s in starts if place < s + size)
        with torch.inference_mode():
            logits = model.model(torch.tensor([ids[start:place]])).logits[0, -1].double()
        nats -= logits.log_softmax(dim=-1)[ids[place]].item()
    score = Scorer(model, size, 3).score_texts([text[:120]])
    assert score.nats == pytest.approx(nats, rel=1e-6)


@pytest.mark.parametrize("length", [3, 10, 11, 16, 17, 100])
def test_windows_score_every_token_once(length: int) -> None:
    ids = list(range(length))
    scored: list[int] = []
    for window, context in likelihood.cut_windows(ids, 2, 10):
        assert len(window) <= 10
        assert 0 < context < len(window)
        scored += window[context:]
    assert scored == ids[2:]


def test_nothing_to_score_is_an_error(model: LoadedModel) -> None:
    with pytest.raises(DataError, match="the held-out file is empty"):
        Scorer(model, 64, 4).score_texts([])


def test_continuations_cost_what_their_tokens_do(model: LoadedModel) -> None:
    pairs = [("日本の首都は", "東京です。"), ("The capital is ", "Tokyo"), ("北京", "市")]
    questions = [(text, [continuation]) for text, continuation in pairs]
    costs = Scorer(model, 64, 2).score_continuations(questions)
    for (text, continuation), (cost,) in zip(pairs, costs, strict=True):
        prefix, alone = model.tokenizer.prefix, model.tokenizer.encode(text)
        ids = model.tokenizer.encode(text + continuation)
        shared = 0
        while shared < len(alone) and alone[shared] == ids[shared]:
            shared += 1
        with torch.inference_mode():
            logits = (
                model.model(torch.tensor([prefix + ids])).logits[0].double().log_softmax(dim=-1)
            )
        expected = -sum(
            logits[len(prefix) + place - 1, ids[place]].item() for place in range(shared, len(ids))
        )
        assert cost == pytest.approx(expected, rel=1e-6)


def test_a_beginning_that_windows_share_is_read_once(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several questions about one text cost as each by itself does, for far fewer tokens."""
    text = "".join(demo_texts("zh", 2))[:250]
    questions = [
        (f"{text}{end}", ["东京", "京都", "大阪是"]) for end in ("", "日本的首都是", "北京")
    ]
    questions.append(("日本の首都は", ["東京", "京都"]))
    with monkeypatch.context() as patch:
        patch.setattr(likelihood, "MIN_SAVED_TOKENS", 10**9)
        alone = Scorer(model, 512, 8).score_continuations(questions)
    read: list[int] = []
    original = Scorer._read

    def count(scorer: Scorer, input_ids: torch.Tensor, **options: Any) -> Any:
        read.append(input_ids.numel())
        return original(scorer, input_ids, **options)

    monkeypatch.setattr(Scorer, "_read", count)
    for batch_size in (1, 2, 8):
        read.clear()
        costs = Scorer(model, 512, batch_size).score_continuations(questions)
        for own, expected in zip(costs, alone, strict=True):
            assert own == pytest.approx(expected, rel=1e-4)
        assert sum(read) < 2.5 * len(model.tokenizer.encode(text))


def test_groups_of_windows() -> None:
    long = tuple(range(100))
    windows = [
        ((*long, 1, 2, 3), 102),  # 0: shares 101 tokens at most: the scored one is 3
        ((9, 8, 7), 2),
        ((*long, 1, 2, 4), 102),  # with 0
        ((*long, 5, 6), 101),  # with 0 and 2, which then share 100
        ((*long[:50], 7, 7, 7), 52),  # half of what they share: alone
    ]
    groups = likelihood.group_windows(windows)
    assert sorted((shared, sorted(group)) for shared, group in groups) == [
        (1, [1]),
        (51, [4]),
        (100, [0, 2, 3]),
    ]
    for shared, group in groups:
        assert len({windows[index][0][:shared] for index in group}) == 1
        assert all(shared < windows[index][1] for index in group)


def test_only_the_end_of_a_long_text_is_read(model: LoadedModel) -> None:
    text, answer = "".join(demo_texts("zh", 1))[:200], "新的图表"
    whole = [*model.tokenizer.encode(text + answer)]
    ((cost,),) = Scorer(model, 32, 1).score_continuations([(text, [answer])])
    kept = [*model.tokenizer.prefix, *whole[-30:]]
    scored = len(whole) - len(model.tokenizer.encode(text))
    with torch.inference_mode():
        logits = model.model(torch.tensor([kept])).logits[0].double().log_softmax(dim=-1)
    expected = -sum(logits[place - 1, kept[place]].item() for place in range(32 - scored, 32))
    assert cost == pytest.approx(expected, rel=1e-6)
    with pytest.raises(DataError, match="too many for --window 32"):
        Scorer(model, 32, 1).score_continuations([("a", [text])])


def test_continuations_of_a_text_are_scored_from_the_same_place(model: LoadedModel) -> None:
    """A piece that spans the border in one of them moves the border for all."""
    tokenizer = model.tokenizer
    pieces = tokenizer.pieces[tokenizer.first_new_id :]
    text, crossing = next(
        (text, piece[-1])
        for text, piece in ((f"図、{piece[:-1]}", piece) for piece in pieces if len(piece) > 1)
        if tokenizer.encode(text + piece[-1])[: len(tokenizer.encode(text))]
        != tokenizer.encode(text)
    )
    plain = "\n"
    border = len(tokenizer.encode(text))
    assert tokenizer.encode(text + plain)[:border] == tokenizer.encode(text)
    joined = tokenizer.encode(text + crossing)
    shared = next(n for n, token in enumerate(tokenizer.encode(text)) if joined[n] != token)
    assert shared < border
    ((_, cost),) = Scorer(model, 64, 2).score_continuations([(text, [crossing, plain])])
    ((alone,),) = Scorer(model, 64, 2).score_continuations([(text, [plain])])
    prefix, ids = tokenizer.prefix, tokenizer.encode(text + plain)
    with torch.inference_mode():
        logits = model.model(torch.tensor([prefix + ids])).logits[0].double().log_softmax(dim=-1)
    each = [-logits[len(prefix) + place - 1, ids[place]].item() for place in range(len(ids))]
    assert alone == pytest.approx(sum(each[border:]), rel=1e-6)
    assert cost == pytest.approx(sum(each[shared:]), rel=1e-6)


def test_losses_of_a_half_precision_model_have_full_precision(
    resized_dir: Path, model: LoadedModel
) -> None:
    half: Any = AutoModelForCausalLM.from_pretrained(resized_dir, dtype=torch.bfloat16)
    model = LoadedModel(half.eval(), model.tokenizer)
    questions = [("日本の首都は", list("東京大阪北南"))]
    (costs,) = Scorer(model, 64, 8).score_continuations(questions)
    rounded = [torch.tensor(cost).bfloat16().item() for cost in costs]
    assert all(abs(a - b) > 1e-6 for a, b in zip(costs, rounded, strict=True))


def test_logits_and_divergence(model: LoadedModel) -> None:
    prompt = [*model.tokenizer.prefix, *model.tokenizer.encode("你好")]
    ((logits, total),) = loading.compute_logits(model.model, [prompt], 100)
    with torch.inference_mode():
        expected = model.model(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(logits, expected[:, :100])
    torch.testing.assert_close(total, expected.logsumexp(-1))
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    other = expected + noise
    p, q = expected.softmax(-1)[:, :100], other.softmax(-1)[:, :100]
    bits = (p * (p / q).log2()).sum(-1)
    after = (other[:, :100], other.logsumexp(-1))
    torch.testing.assert_close(likelihood.compute_divergence((logits, total), after), bits)
    # A constant added to all logits changes nothing; added to the other ids only, it does.
    assert (
        likelihood.compute_divergence((logits, total), (logits + 3, total + 3)).abs().max() < 1e-5
    )
    assert likelihood.compute_divergence((logits, total), (logits, total + 1)).min() > 0
