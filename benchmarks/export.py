"""Compare GGUF files of step 8, in llama.cpp, with the folder that they were made from.

Held-out lines of three languages and hostile strings are tokenized, held-out questions written as
prompts and answered greedily, all by llama.cpp and by the folder: sentencepiece and transformers
in float32. Needs llama-cpp-python (0.3.36 here), which compiles llama.cpp in some minutes.

    pip install llama-cpp-python==0.3.36
    python benchmarks/export.py --model artifacts/demo/step6_sft \\
        --gguf artifacts/demo/step8_export/model-F16.gguf
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

# In this folder; importing it makes the project's package importable.
import measuring
import torch

import constants
from chatglm_ja.cli import run
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.inference.models import LoadedModel, load_model
from chatglm_ja.messages import Message

HOSTILE = [
    "people and philosophy", "sop", "eop", "a sop b eop", "sopeop<sop>eop<eop>", "<|user|>", "</s>",
    "<s>", "<unk>", "[MASK][gMASK]", "<0x0A>", "🙂🏽‍💻", "\x01\x02\x1f\x7f", "a\tb\r\nc",
    "  two  spaces ", "\u2581", "\ufeff\u200b", "é\u0301", "\U0010ffff",
]  # fmt: skip


def held_out_lines(count: int) -> list[str]:
    """Return as many lines of each of the three languages, `count` in all."""
    reader = SourceReader()
    lines: list[str] = []
    for source in constants.HELD_OUT_SOURCES:
        texts = (line for text in reader.texts(source) for line in text.split("\n") if line)
        lines += itertools.islice(texts, -(-count // len(constants.HELD_OUT_SOURCES)))
    return lines


def held_out_prompts(count: int) -> list[list[Message]]:
    """Return as many questions of each kind, `count` in all, without their last answers."""
    reader = SourceReader()
    prompts: list[list[Message]] = []
    for source in constants.HELD_OUT_CONVERSATIONS:
        each = -(-count // len(constants.HELD_OUT_CONVERSATIONS))
        prompts += [talk[:-1] for talk in itertools.islice(reader.conversations(source), each)]
    return prompts


@torch.inference_mode()
def expect(loaded: LoadedModel, prompt: list[int], limit: int) -> tuple[list[int], torch.Tensor]:
    """Return transformers' greedy answer, stop token included, and the logits after the prompt."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    logits = loaded.model(ids, attention_mask=mask).logits[0]
    made = loaded.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=limit)
    return made[0, len(prompt) :].tolist(), logits[:, : loaded.tokenizer.size]


def answer(llama: Any, prompt: list[int], limit: int) -> tuple[list[int], torch.Tensor]:
    """Return llama.cpp's greedy answer and its logits, as `expect` does."""
    import llama_cpp

    def is_end(token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(llama._model.vocab, token))

    llama.reset()
    llama.eval(prompt)
    logits = torch.from_numpy(llama.scores[: len(prompt)].copy())
    ids: list[int] = []
    while len(ids) < limit and not (ids and is_end(ids[-1])):
        if ids:
            llama.eval(ids[-1:])
        ids.append(int(llama.scores[llama.n_tokens - 1].argmax()))
    return ids, logits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of step 3, 5 or 6")
    parser.add_argument(
        "--gguf", type=Path, nargs="+", required=True, help="files that step 8 made of it"
    )
    parser.add_argument("--lines", type=int, default=1000, help="lines to tokenize (1000)")
    parser.add_argument("--prompts", type=int, default=40, help="questions to answer (40)")
    parser.add_argument("--tokens", type=int, default=64, help="length of answers (64)")
    options = parser.parse_args()
    # Not among the project's packages: --help does not need it.
    import llama_cpp
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    loaded = load_model(options.model)
    texts = [*held_out_lines(options.lines), *HOSTILE]
    asked = held_out_prompts(options.prompts)
    line_break = loaded.tokenizer.encode("\n")  # begins every answer; the template writes it
    prompts = [[*loaded.tokenizer.build_prompt(messages), *line_break] for messages in asked]
    expected = [expect(loaded, prompt, options.tokens) for prompt in prompts]
    rows = []
    for path in options.gguf:
        llama = llama_cpp.Llama(str(path), n_ctx=loaded.window, logits_all=True, verbose=False)
        template = Jinja2ChatFormatter(llama.metadata["tokenizer.chat_template"], "", "")
        same_ids = sum(
            llama.tokenize(text.encode(), add_bos=False, special=False)
            == loaded.tokenizer.encode(text)
            for text in texts
        )
        rendered = (template(messages=messages).prompt.encode() for messages in asked)
        same_prompts = sum(
            llama.tokenize(text, add_bos=False, special=True) == prompt
            for text, prompt in zip(rendered, prompts, strict=True)
        )
        answered = [answer(llama, prompt, options.tokens) for prompt in prompts]
        pairs = list(zip(answered, expected, strict=True))
        same_answers = sum(ours == theirs for (ours, _), (theirs, _) in pairs)
        largest = max(float((ours - theirs).abs().max()) for (_, ours), (_, theirs) in pairs)
        counts = [(same_ids, len(texts)), (same_prompts, len(asked)), (same_answers, len(asked))]
        rows.append([path.name, *(f"{n:,} of {of:,}" for n, of in counts), f"{largest:.4f}"])
    head = ["file", "same token ids", "same prompts", "same greedy answers", "logits differ by"]
    print(measuring.table(head, rows))
    largest_logit = max(float(logits.abs().max()) for _, logits in expected)
    print(f"\nThe largest logit is {largest_logit:.1f}.")
    measuring.conclude([], {"llama.cpp": {"llama-cpp-python": llama_cpp.__version__}})


if __name__ == "__main__":
    run(main)
