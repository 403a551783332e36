"""Answers of a model, greedy or sampled, many prompts at once.

Prompts are token ids in ChatGLM3's conversation format (chat.py), and every answer ends at one of
its stop tokens or at the limit. A greedy answer does not depend, but for rounding, on what it is
batched with: padding is on the left and masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from chatglm_ja import chat
from chatglm_ja.tokenizer import UNK_ID

# What ChatGLM3's own chat samples with; the 50 was transformers' default when that was written.
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.8, "top_k": 50}
GREEDY = {"do_sample": False}


@dataclass(frozen=True)
class Answer:
    """A model's answer; `stopped` says that it ended by itself, before the limit."""

    text: str
    tokens: int
    stopped: bool


@torch.inference_mode()
def answer(
    model: Any,
    encoder: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampled: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    title: str = "answers",
) -> list[Answer]:
    """An answer to each prompt, of at most `max_new_tokens` tokens, by a GlmForCausalLM.

    Greedy, or `sampled` as ChatGLM3's own chat does, where the same seed, prompts and batch size
    give the same answers. `encoder` is the sentencepiece processor of the model's tokenizer.
    """
    stops = chat.stop_ids(encoder)
    # Rows without an id in the tokenizer: padding of the embeddings.
    padding = list(range(encoder.get_piece_size(), model.config.vocab_size))
    # Prompts of like length together: little padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, Answer] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), tqdm(total=len(order), desc=title, leave=False) as bar:
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = len(prompts[chosen[-1]])
            input_ids = torch.full((len(chosen), longest), UNK_ID)
            mask = torch.zeros_like(input_ids)
            for row, index in enumerate(chosen):
                room = longest - len(prompts[index])
                input_ids[row, room:] = torch.tensor(prompts[index])
                mask[row, room:] = 1
            output = model.generate(
                input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                eos_token_id=stops,
                pad_token_id=UNK_ID,
                suppress_tokens=padding or None,
                **(SAMPLING if sampled else GREEDY),
            )
            for index, ids in zip(chosen, output[:, longest:].tolist(), strict=True):
                answers[index] = _answer(encoder, ids, stops)
            bar.update(len(chosen))
    return [answers[index] for index in range(len(prompts))]


def _answer(encoder: Any, ids: list[int], stops: Sequence[int]) -> Answer:
    """Up to the first stop token; what follows it is padding."""
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    stopped = end is not None
    text = encoder.decode(ids[:end]).strip()
    return Answer(text, len(ids) if end is None else end + 1, stopped)
