"""Answers: their ends, batches, sampling, and streaming."""

import itertools
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from transformers import (
    GenerationConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chatglm_ja.inference import generation
from chatglm_ja.inference.generation import GREEDY, ChatOptions, Reply, Sampling
from chatglm_ja.inference.models import LoadedModel

QUESTIONS = (
    "あなたは誰ですか",
    "x",
    "Please explain the function of the toolbar.",
    "请说明“保存”。",
)


@pytest.fixture
def prompts(model: LoadedModel) -> list[list[int]]:
    return [model.tokenizer.build_prompt([{"role": "user", "content": q}]) for q in QUESTIONS]


@pytest.fixture
def stopping(model: LoadedModel, prompts: list[list[int]]) -> Iterator[None]:
    """Make <|user|> the likeliest token after the second prompt, and after no other."""
    rows = model.model.get_output_embeddings().weight
    stop = model.tokenizer.pieces.index("<|user|>")
    original = rows[stop].clone()
    with torch.no_grad():
        ends = [model.model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in prompts]
        logits = torch.tensor([-1000.0, 1000.0, -1000.0, -1000.0])
        rows[stop] = torch.linalg.lstsq(torch.stack(ends), logits).solution
    yield
    with torch.no_grad():
        rows[stop] = original


def test_answers_end_at_the_limit(model: LoadedModel, prompts: list[list[int]]) -> None:
    (answer,) = generation.generate_answers(model, prompts[:1], 5)
    assert answer.tokens == 5
    assert not answer.stopped


@pytest.mark.usefixtures("stopping")
def test_answers_end_at_a_stop_token(model: LoadedModel, prompts: list[list[int]]) -> None:
    """Alone, and in a batch with longer answers."""
    (alone,) = generation.generate_answers(model, prompts[1:2], 5)
    beside = generation.generate_answers(model, prompts, 5)
    assert (alone.text, alone.tokens, alone.stopped) == ("", 1, True)
    assert beside[1] == alone
    assert all(answer.tokens > 1 for answer in beside if answer is not beside[1])
    # Other tools stop there too, by the folder's generation_config.json.
    ids = torch.tensor([prompts[1]])
    assert model.model.generate(ids, max_new_tokens=5).shape[1] == len(prompts[1]) + 1


def test_greedy_answers_are_greedy_although_the_folder_samples(
    model: LoadedModel, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.model.generation_config.do_sample
    answers = generation.generate_answers(model, prompts, 12)
    for index, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(12):
            logits = model.model(torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits[: model.tokenizer.size].argmax()))
        assert answers[index].text == model.tokenizer.decode(ids[len(prompt) :]).strip()
    monkeypatch.setattr(model.model, "generation_config", GenerationConfig())
    assert generation.generate_answers(model, prompts, 12) == answers


@pytest.mark.parametrize("batch_size", [2, 32])
def test_batching_does_not_change_greedy_answers(
    model: LoadedModel, prompts: list[list[int]], batch_size: int
) -> None:
    alone = [generation.generate_answers(model, [prompt], 12)[0] for prompt in prompts]
    assert len({answer.text for answer in alone}) > 1
    together = generation.generate_answers(model, prompts, 12, batch_size=batch_size)
    assert together == alone
    # Compare with argmax, token by token, without a cache or padding.
    ids = list(prompts[2])
    for _ in range(12):
        with torch.inference_mode():
            logits = model.model(torch.tensor([ids])).logits[0, -1, : model.tokenizer.size]
        ids.append(int(logits.argmax()))
    assert together[2].text == model.tokenizer.decode(ids[len(prompts[2]) :]).strip()


def test_the_seed_determines_sampled_answers(model: LoadedModel, prompts: list[list[int]]) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (
        generation.generate_answers(model, prompts, 12, sampling=Sampling(), seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first != generation.generate_answers(model, prompts, 12)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.3, 0.5, 7),
        Sampling(1.5, 1.0, 0),
        Sampling(1.0, 0.01),
        Sampling(2, 0.9),
    ],
)
def test_candidates_are_those_of_transformers(sampling: Sampling) -> None:
    scores = 3 * torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(40, 1, dtype=torch.long)
    expected = TemperatureLogitsWarper(float(sampling.temperature))(ids, scores)
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(ids, expected)
    if sampling.top_p < 1:
        expected = TopPLogitsWarper(sampling.top_p)(ids, expected)
    shares, candidates = generation._Sampler(sampling).top_candidates(scores)
    probabilities = torch.zeros_like(scores).scatter(-1, candidates, shares)
    torch.testing.assert_close(probabilities, expected.softmax(dim=-1))


def test_tokens_are_sampled_by_their_probability() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -9.0]).expand(20_000, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        left = generation._Sampler(Sampling(1.0, 1.0, 3))(torch.zeros(1), scores)
    assert (left.isfinite().sum(dim=-1) == 1).all()
    counts = torch.bincount(left.argmax(dim=-1), minlength=4) / len(scores)
    expected = torch.tensor([2.0, 1.0, 0.0, -torch.inf]).softmax(dim=-1)
    torch.testing.assert_close(counts, expected, atol=0.01, rtol=0)


def test_padding_rows_are_never_generated(model: LoadedModel, prompts: list[list[int]]) -> None:
    rows = model.model.get_output_embeddings().weight
    assert len(rows) > model.tokenizer.size
    with torch.no_grad():
        rows[-1] = 1000 * model.model.model(torch.tensor([prompts[0]])).last_hidden_state[0, -1]
    (answer,) = generation.generate_answers(model, prompts[:1], 3)
    with torch.no_grad():
        rows[-1] = 0
    assert answer == generation.generate_answers(model, prompts[:1], 3)[0]


def test_a_streamed_answer_is_the_whole_answer(
    model: LoadedModel, prompts: list[list[int]]
) -> None:
    """Random tokens, among them bytes of complete and of incomplete characters."""
    whole_characters = 0
    for prompt in prompts:
        for sampling in (GREEDY, Sampling(temperature=2.0, top_p=1.0, top_k=0)):
            torch.manual_seed(3)
            answers = list(generation.stream_answer(model, prompt, ChatOptions(sampling, 40)))
            torch.manual_seed(3)
            ids = generation._generate(model, [prompt], 40, sampling)[0].tolist()
            text = model.tokenizer.decode(ids).strip().rstrip("\ufffd")
            assert answers[-1] == Reply(text, 40, stopped=False, ids=tuple(ids))
            assert len(answers) > 5
            assert not any(answer.stopped for answer in answers[:-1])
            texts = [answer.text for answer in answers]
            assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
            whole_characters += sum(not text.endswith("\ufffd") for text in texts)
    assert whole_characters > 100


@pytest.mark.usefixtures("stopping")
def test_a_streamed_answer_says_whether_it_was_cut(
    model: LoadedModel, prompts: list[list[int]]
) -> None:
    cut, stopped = (
        list(generation.stream_answer(model, prompt, ChatOptions(GREEDY, 1)))[-1]
        for prompt in prompts[:2]
    )
    assert (cut.tokens, cut.stopped) == (1, False)
    assert (stopped.tokens, stopped.stopped) == (1, True)


def test_a_continued_answer_is_the_uncut_one(model: LoadedModel, prompts: list[list[int]]) -> None:
    """Also where it was cut before a space, or inside a character spelled in bytes."""
    for prompt in prompts:
        (*_, uncut) = generation.stream_answer(model, prompt, ChatOptions(GREEDY, 16))
        for cut in range(1, 16, 3):
            (*_, begun) = generation.stream_answer(model, prompt, ChatOptions(GREEDY, cut))
            rest = ChatOptions(GREEDY, 16 - cut)
            answers = list(generation.stream_answer(model, prompt, rest, begun.ids))
            assert answers[-1] == uncut
            assert all(answer.text.startswith(begun.text) for answer in answers)


def test_a_character_in_bytes_is_shown_when_it_is_complete(model: LoadedModel) -> None:
    shown: list[Reply] = []
    answer = generation._ReplyStreamer(model.tokenizer, [], shown.append)
    answer.put(torch.tensor([1, 2, 3]))  # the prompt
    spelled = [model.tokenizer.pieces.index(f"<0x{byte:02X}>") for byte in "🦊".encode()]
    tokens = [
        *model.tokenizer.encode("狐"),
        *spelled,
        *model.tokenizer.encode("だ"),
        model.tokenizer.stop_ids[0],
    ]
    for token in tokens:
        answer.put(torch.tensor([token]))
    texts = [answer.text for answer in shown]
    assert texts[-1] == model.tokenizer.decode(tokens[:-1]).strip()
    assert "狐🦊" in texts
    assert not any("\ufffd" in text for text in texts)


def test_closing_a_stream_stops_its_thread(model: LoadedModel, prompts: list[list[int]]) -> None:
    stream = generation.stream_answer(model, prompts[0], ChatOptions(GREEDY, 1500))
    next(stream)
    assert threading.active_count() > 1
    before = threading.active_count()
    stream.close()
    assert threading.active_count() == before - 1


def test_a_stream_keeps_its_time_limit(model: LoadedModel, prompts: list[list[int]]) -> None:
    start = time.monotonic()
    list(generation.stream_answer(model, prompts[0], ChatOptions(GREEDY, 1900, seconds=0.3)))
    assert time.monotonic() - start < 5


def test_errors_of_the_thread_are_raised(model: LoadedModel) -> None:
    with pytest.raises(IndexError):
        list(generation.stream_answer(model, [10**6], ChatOptions(GREEDY, 5)))


def test_tokens_per_second(model: LoadedModel) -> None:
    prompt = model.tokenizer.build_prompt([])
    start = time.perf_counter()
    speed = generation.tokens_per_second(model, prompt)
    whole = generation.TIMED_ROUNDS * generation.TIMED_TOKENS / (time.perf_counter() - start)
    assert whole / 3 < speed < 10_000
