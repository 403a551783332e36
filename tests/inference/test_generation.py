"""Answers: where they end, that a batch changes none of them, and as they are written."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chatglm_ja.chatglm3 import chat_format
from chatglm_ja.inference import generation
from chatglm_ja.inference.generation import GREEDY, Sampling

QUESTIONS = (
    "あなたは誰ですか",
    "x",
    "Please explain the function of the toolbar.",
    "请说明“保存”。",
)


@pytest.fixture(scope="module")
def model(resized_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(resized_dir, dtype=torch.float32).eval()


@pytest.fixture
def prompts(encoder: Any) -> list[list[int]]:
    return [
        chat_format.build_prompt_ids(encoder, [{"role": "user", "content": q}]) for q in QUESTIONS
    ]


@pytest.fixture
def stopping(model: Any, encoder: Any, prompts: list[list[int]]) -> Iterator[None]:
    """Makes <|user|> the likeliest token at the end of the second prompt, and of no other."""
    rows = model.get_output_embeddings().weight
    stop = chat_format.special_id(encoder, "<|user|>")
    kept = rows[stop].clone()
    with torch.no_grad():
        ends = [model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in prompts]
        logits = torch.tensor([-1000.0, 1000.0, -1000.0, -1000.0])
        rows[stop] = torch.linalg.lstsq(torch.stack(ends), logits).solution
    yield
    with torch.no_grad():
        rows[stop] = kept


def test_answers_end_at_the_limit(model: Any, encoder: Any, prompts: list[list[int]]) -> None:
    (given,) = generation.generate_answers(model, encoder, prompts[:1], 5)
    assert given.tokens == 5
    assert not given.stopped


@pytest.mark.usefixtures("stopping")
def test_answers_end_at_a_stop_token(model: Any, encoder: Any, prompts: list[list[int]]) -> None:
    """Alone, and beside others that go on and pad what it is given."""
    (alone,) = generation.generate_answers(model, encoder, prompts[1:2], 5)
    beside = generation.generate_answers(model, encoder, prompts, 5)
    assert (alone.text, alone.tokens, alone.stopped) == ("", 1, True)
    assert beside[1] == alone
    assert all(answer.tokens > 1 for answer in beside if answer is not beside[1])
    # As other tools find it, from the folder's own generation_config.json.
    ids = torch.tensor([prompts[1]])
    assert model.generate(ids, max_new_tokens=5).shape[1] == len(prompts[1]) + 1


@pytest.mark.parametrize("batch_size", [2, 32])
def test_a_batch_changes_no_answer(
    model: Any, encoder: Any, prompts: list[list[int]], batch_size: int
) -> None:
    alone = [generation.generate_answers(model, encoder, [prompt], 12)[0] for prompt in prompts]
    assert len({answer.text for answer in alone}) > 1
    together = generation.generate_answers(model, encoder, prompts, 12, batch_size=batch_size)
    assert together == alone
    # Against the greedy choice, a token at a time without cache or padding.
    ids = list(prompts[2])
    for _ in range(12):
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1, : encoder.get_piece_size()]
        ids.append(int(logits.argmax()))
    assert together[2].text == encoder.decode(ids[len(prompts[2]) :]).strip()


def test_samples_are_those_of_the_seed(model: Any, encoder: Any, prompts: list[list[int]]) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (
        generation.generate_answers(model, encoder, prompts, 12, sampling=Sampling(), seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first != generation.generate_answers(model, encoder, prompts, 12)
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
def test_tokens_are_drawn_from_what_transformers_would(sampling: Sampling) -> None:
    scores = 3 * torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(40, 1, dtype=torch.long)
    expected = TemperatureLogitsWarper(float(sampling.temperature))(ids, scores)
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(ids, expected)
    if sampling.top_p < 1:
        expected = TopPLogitsWarper(sampling.top_p)(ids, expected)
    shares, candidates = generation._Draw(sampling).candidates(scores)
    found = torch.zeros_like(scores).scatter(-1, candidates, shares)
    torch.testing.assert_close(found, expected.softmax(dim=-1))


def test_the_token_is_drawn_by_its_probability() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -9.0]).expand(20_000, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        left = generation._Draw(Sampling(1.0, 1.0, 3))(torch.zeros(1), scores)
    assert (left.isfinite().sum(dim=-1) == 1).all()
    counts = torch.bincount(left.argmax(dim=-1), minlength=4) / len(scores)
    expected = torch.tensor([2.0, 1.0, 0.0, -torch.inf]).softmax(dim=-1)
    torch.testing.assert_close(counts, expected, atol=0.01, rtol=0)


def test_padding_rows_are_never_answered(
    model: Any, encoder: Any, prompts: list[list[int]]
) -> None:
    rows = model.get_output_embeddings().weight
    assert len(rows) > encoder.get_piece_size()
    with torch.no_grad():
        rows[-1] = 1000 * model.model(torch.tensor([prompts[0]])).last_hidden_state[0, -1]
    (given,) = generation.generate_answers(model, encoder, prompts[:1], 3)
    with torch.no_grad():
        rows[-1] = 0
    assert given == generation.generate_answers(model, encoder, prompts[:1], 3)[0]


def test_a_streamed_answer_is_the_answer(
    model: Any, encoder: Any, prompts: list[list[int]]
) -> None:
    """Random tokens: bytes of characters among them, whole and not."""
    whole_characters = 0
    for prompt in prompts:
        for sampling in (GREEDY, Sampling(temperature=2.0, top_p=1.0, top_k=0)):
            torch.manual_seed(3)
            pieces = list(generation.stream_answer(model, encoder, prompt, 40, sampling=sampling))
            torch.manual_seed(3)
            ids = generation._generate(
                model, encoder, torch.tensor([prompt]), torch.ones(1, len(prompt)), 40, sampling
            )[0, len(prompt) :].tolist()
            assert "".join(pieces) == generation._answer(encoder, ids).text
            assert len(pieces) > 5
            whole_characters += sum(not piece.startswith("\ufffd") for piece in pieces)
    assert whole_characters > 100


def test_a_character_in_bytes_is_shown_when_it_is_whole(encoder: Any) -> None:
    shown: list[str] = []
    pieces = generation._Pieces(encoder, shown.append)
    pieces.put(torch.tensor([1, 2, 3]))  # the prompt
    spelled = [encoder.piece_to_id(f"<0x{byte:02X}>") for byte in "🦊".encode()]
    tokens = [
        *encoder.encode("狐"),
        *spelled,
        *encoder.encode("だ"),
        chat_format.stop_ids(encoder)[0],
    ]
    for token in tokens:
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert "".join(shown) == encoder.decode(tokens[:-1]).strip()
    assert "🦊" in shown
    assert not any("\ufffd" in piece for piece in shown)


def test_bytes_that_are_no_character_are_shown_at_the_end(encoder: Any) -> None:
    shown: list[str] = []
    pieces = generation._Pieces(encoder, shown.append)
    pieces.put(torch.tensor([1]))
    for token in (*encoder.encode("a"), encoder.piece_to_id("<0xF0>")):
        pieces.put(torch.tensor([token]))
    assert shown == ["a"]
    pieces.end()
    assert shown == ["a", "\ufffd"]


def test_closing_a_stream_stops_the_writer(
    model: Any, encoder: Any, prompts: list[list[int]]
) -> None:
    stream = generation.stream_answer(model, encoder, prompts[0], 1500, sampling=GREEDY)
    next(stream)
    assert threading.active_count() > 1
    before = threading.active_count()
    stream.close()
    assert threading.active_count() == before - 1


def test_a_stream_ends_in_time(model: Any, encoder: Any, prompts: list[list[int]]) -> None:
    start = time.monotonic()
    list(generation.stream_answer(model, encoder, prompts[0], 1900, sampling=GREEDY, seconds=0.3))
    assert time.monotonic() - start < 5


def test_what_goes_wrong_in_a_stream_is_raised(model: Any, encoder: Any) -> None:
    with pytest.raises(IndexError):
        list(generation.stream_answer(model, encoder, [10**6], 5, sampling=GREEDY))


def test_speed_is_of_the_tokens_after_the_first(model: Any, encoder: Any) -> None:
    prompt = chat_format.build_prompt_ids(encoder, [])
    start = time.perf_counter()
    speed = generation.tokens_per_second(model, encoder, prompt)
    whole = generation.TIMED_ROUNDS * generation.TIMED_TOKENS / (time.perf_counter() - start)
    assert whole / 3 < speed < 10_000
