"""Select the demo's texts and conversations from the parallel LibreOffice help (MPL-2.0).

This script generated the files in `demo/data/`. It documents how they were selected and can
regenerate them. The input is one `help_<language>.jsonl.gz` per language with records {"id",
"title", "text"}; the same id is the same page in every language.

For each page, the script
  * drops the lines of a Japanese or Chinese page that were not translated from English;
  * holds out 5% of the pages, chosen by a hash of their id, so the same pages in every language.
    No step trains on held-out files, and lines that also occur on a training page are removed
    from them (help pages repeat each other);
  * builds single-turn conversations of four kinds: `ja`, `zh` and `en`, by the language of the
    answer (explain a title, translate a passage), and `code` (a Basic example from the page). There
    are two mixes of them: one with Chinese, and one for a base that cannot read Chinese;
  * builds multiple-choice questions from held-out pages: which of four lines, three of them from
    other pages, comes next?
  * collects lines of held-out pages in all three languages, for translation.

    python demo/make_data.py --help-corpus DIR
"""

import argparse
import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTPUT_DIR = Path(__file__).parent / "data"
LANGUAGES = ("ja", "zh", "en")
LANGUAGE_NAMES = {"ja": "Japanese", "zh": "Chinese", "en": "English"}
MIN_PAGE_CHARS = 120
MAX_CHARS = {"ja": 1_100_000, "zh": 1_050_000, "en": 1_300_000}
HELD_OUT_PERCENT = 5
HELD_OUT_CONVERSATIONS = 25  # per kind, or all if there are fewer
CHOICES = 4
CHOICE_QUESTIONS = 50  # per language, at most four per page
CHOICES_PER_PAGE = 4
PARALLEL_LINES = 40  # at most two per page
CONTEXT_CHARS = {"ja": 100, "zh": 100, "en": 250}
PASSAGE_CHARS = {"ja": (12, 90), "zh": (10, 70), "en": (25, 200)}
ANSWER_CHARS = {"ja": 160, "zh": 120, "en": 300, "code": 400}

CJK = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
KANA = re.compile(r"[\u3040-\u30ff]")
BASIC_PROCEDURE = re.compile(r"\b(Sub|Function) \w+.*?\bEnd \1\b")

EXPLAIN = {
    "ja": "「{}」について説明してください。",
    "zh": "请说明“{}”。",
    "en": 'Please explain "{}".',
}
TRANSLATE_INTO = {
    "ja": "次の文を日本語に翻訳してください。\n{}",
    "zh": "请把下面的句子翻译成中文。\n{}",
    "en": "Translate the following sentence into English.\n{}",
}
WRITE_CODE = {
    "ja": "「{}」を使う Basic の例を書いてください。",
    "zh": "请写一个使用“{}”的 Basic 示例。",
    "en": 'Write a Basic example that uses "{}".',
}

Page = dict[str, str]


@dataclass(frozen=True)
class Mix:
    """The conversations of train_<name> and heldout_<name>, and how many of a kind to train on."""

    name: str
    languages: tuple[str, ...]
    directions: tuple[tuple[str, str], ...]
    counts: Mapping[str, int]

    def conversations(self, page_id: str, page: dict[str, Page]) -> Iterator[dict[str, object]]:
        yield from explanations(page_id, page, self.languages)
        yield from translations(page_id, page, self.directions)
        yield from code_examples(page_id, page, self.languages)


MIXES = (
    # The article's, 52 : 22 : 9 : 17.
    Mix(
        "sft",
        LANGUAGES,
        (("en", "ja"), ("zh", "ja"), ("en", "zh"), ("zh", "en")),
        {"ja": 936, "zh": 396, "en": 162, "code": 306},
    ),
    Mix(
        "sft_ja_en",
        ("ja", "en"),
        (("en", "ja"), ("ja", "en")),
        {"ja": 1400, "en": 500, "code": 100},
    ),
)


def read_parallel_pages(folder: Path) -> dict[str, dict[str, Page]]:
    """Return the pages that exist in all three languages: id -> language -> page, sorted by id."""
    pages: dict[str, dict[str, Page]] = {}
    for language in LANGUAGES:
        with gzip.open(folder / f"help_{language}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for page in map(json.loads, lines):
                pages.setdefault(page["id"], {})[language] = page
    return {key: pages[key] for key in sorted(pages) if len(pages[key]) == len(LANGUAGES)}


def is_translated(line: str, language: str) -> bool:
    """Return whether a line is in the page's language; short labels and formulas count as such."""
    if language == "en":
        return not CJK.search(line)
    if language == "zh" and KANA.search(line):
        return False
    return bool(CJK.search(line)) or len(re.findall(r"[A-Za-z]{2,}", line)) < 4


def clean_text(page: Page, language: str) -> str:
    lines = (line.strip() for line in page["text"].split("\n"))
    return "\n".join(line for line in lines if line and is_translated(line, language))


def is_held_out(page_id: str) -> bool:
    return int(hashlib.sha256(page_id.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def new_lines(page: Page, trained: set[str]) -> Page:
    """Return the page without the lines that also occur on training pages."""
    lines = page["text"].split("\n")
    return {"id": page["id"], "text": "\n".join(line for line in lines if line not in trained)}


def explanation(page: Page, language: str) -> str | None:
    """Return the first paragraph after the title, or None if it is a list or too long."""
    lines = [line for line in clean_text(page, language).split("\n") if line != page["title"]]
    ends = "。" if language in ("ja", "zh") else "."
    if not lines or not lines[0].endswith(ends):
        return None
    if language != "en" and not CJK.search(lines[0]):
        return None
    if len(lines[0]) > ANSWER_CHARS[language]:
        return None
    return lines[0]


def conversation(key: str, kind: str, question: str, answer: str) -> dict[str, object]:
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"id": key, "kind": kind, "messages": messages}


def answer_of(record: Mapping[str, Any]) -> str:
    return record["messages"][-1]["content"]


def explanations(
    page_id: str, page: dict[str, Page], languages: Sequence[str]
) -> Iterator[dict[str, object]]:
    for language in languages:
        title = page[language]["title"]
        answer = explanation(page[language], language)
        if answer and (language != "ja" or CJK.search(title)):
            key = f"{page_id}#explain-{language}"
            yield conversation(key, language, EXPLAIN[language].format(title), answer)


def translations(
    page_id: str, page: dict[str, Page], directions: Sequence[tuple[str, str]]
) -> Iterator[dict[str, object]]:
    """Yield at most two aligned lines per direction; pages are translated line by line."""
    lines = {language: page[language]["text"].split("\n") for language in LANGUAGES}
    if len({len(x) for x in lines.values()}) != 1:
        return
    for source, target in directions:
        taken = 0
        for number, (text, answer) in enumerate(zip(lines[source], lines[target], strict=True)):
            (low, high), (target_low, target_high) = PASSAGE_CHARS[source], PASSAGE_CHARS[target]
            in_length = low <= len(text) <= high and target_low <= len(answer) <= target_high
            in_language = is_translated(text, source) and is_translated(answer, target)
            has_script = target == "en" or CJK.search(answer)
            is_prose = not BASIC_PROCEDURE.search(text) and text != answer
            if in_length and in_language and has_script and is_prose and taken < 2:
                taken += 1
                key = f"{page_id}#translate-{source}-{target}-{number}"
                yield conversation(key, target, TRANSLATE_INTO[target].format(text), answer)


def code_examples(
    page_id: str, page: dict[str, Page], languages: Sequence[str]
) -> Iterator[dict[str, object]]:
    """Yield the page's first Basic procedure in each language, with a request in that language."""
    for language in languages:
        for line in page[language]["text"].split("\n"):
            match = BASIC_PROCEDURE.search(line)
            if match and len(match.group()) <= ANSWER_CHARS["code"]:
                title = page[language]["title"]
                key = f"{page_id}#code-{language}"
                yield conversation(key, "code", WRITE_CODE[language].format(title), match.group())
                break


def next_lines(pages: Sequence[Page], language: str) -> list[dict[str, object]]:
    """Return questions: which of four lines comes next? The wrong ones are from other pages."""
    low, high = PASSAGE_CHARS[language]
    found: list[tuple[str, str, str]] = []
    for page in pages:
        lines = page["text"].split("\n")
        ends = [
            number
            for number, line in enumerate(lines)
            if number
            and low <= len(line) <= high
            and line[-1] in "。.：:"
            and line not in lines[:number]
        ]
        for number in ends[:: max(1, len(ends) // CHOICES_PER_PAGE)][:CHOICES_PER_PAGE]:
            context = "\n".join(lines[:number])[-CONTEXT_CHARS[language] :] + "\n"
            found.append((page["id"], context, lines[number]))
    random.Random(language).shuffle(found)
    questions: list[dict[str, object]] = []
    for page_id, context, answer in found[:CHOICE_QUESTIONS]:
        draw = random.Random(f"{page_id} {answer}")
        others = sorted({line for key, _, line in found if key != page_id} - {answer})
        choices = [answer, *draw.sample(others, CHOICES - 1)]
        draw.shuffle(choices)
        questions.append(
            {
                "id": page_id,
                "language": language,
                "question": context,
                "choices": choices,
                "answer": choices.index(answer),
            }
        )
    return questions


def parallel_lines(
    pages: Sequence[tuple[str, dict[str, Page]]], trained: Mapping[str, set[str]]
) -> list[dict[str, str]]:
    """Return lines of held-out pages in all languages, none of which is on a training page."""
    found: dict[str, dict[str, str]] = {}  # by the English line: pages repeat each other
    for page_id, page in pages:
        lines = [page[language]["text"].split("\n") for language in LANGUAGES]
        if not is_held_out(page_id) or len({len(own) for own in lines}) != 1:
            continue
        taken = 0
        for texts in zip(*lines, strict=True):
            line = dict(zip(LANGUAGES, texts, strict=True))
            is_new = line["en"] not in found and taken < 2
            if is_new and all(fits_passage(line[name], name, trained[name]) for name in line):
                taken += 1
                columns = {LANGUAGE_NAMES[name]: text for name, text in line.items()}
                found[line["en"]] = {"id": f"{page_id}#{taken}", **columns}
    return list(found.values())[:PARALLEL_LINES]


def fits_passage(line: str, language: str, trained: set[str]) -> bool:
    """Return whether a line is a new sentence of the language, neither short nor long."""
    low, high = PASSAGE_CHARS[language]
    has_script = language == "en" or CJK.search(line)
    is_prose = not BASIC_PROCEDURE.search(line) and line[-1:] in "。."
    is_new = low <= len(line) <= high and line not in trained
    return bool(is_new and has_script and is_prose and is_translated(line, language))


def write_jsonl(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    # mtime=0 makes the bytes depend only on the records.
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as out:
        for record in records:
            out.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
    print(f"{path.name:28s} {len(records):6,d} records {path.stat().st_size:9,d} bytes")


def choose_conversations(
    mix: Mix, pages: Sequence[tuple[str, dict[str, Page]]]
) -> dict[bool, list[dict[str, object]]]:
    """Return a mix's conversations: False -> to train on, True -> held out."""
    chosen: dict[bool, list[dict[str, object]]] = {True: [], False: []}
    trained_answers: set[str] = set()
    for is_test in (False, True):
        by_kind: dict[str, list[dict[str, object]]] = {kind: [] for kind in mix.counts}
        seen: set[str] = set()
        for page_id, page in pages:
            if is_held_out(page_id) != is_test:
                continue
            for record in mix.conversations(page_id, page):
                text = json.dumps(record["messages"])
                known = is_test and answer_of(record) in trained_answers
                if text not in seen and not known:
                    seen.add(text)
                    by_kind[str(record["kind"])].append(record)
        for kind, records in by_kind.items():
            wanted = HELD_OUT_CONVERSATIONS if is_test else mix.counts[kind]
            if len(records) < wanted and not is_test:
                raise SystemExit(f"only {len(records)} conversations of kind {kind}, not {wanted}")
            random.Random(kind).shuffle(records)
            chosen[is_test] += records[:wanted]
        random.Random(0).shuffle(chosen[is_test])
        trained_answers.update(map(answer_of, chosen[is_test]))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--help-corpus", type=Path, required=True, help="folder with help_*.jsonl.gz"
    )
    folder = parser.parse_args().help_corpus
    pages = list(read_parallel_pages(folder).items())
    random.Random(0).shuffle(pages)
    OUTPUT_DIR.mkdir(exist_ok=True)

    questions: list[dict[str, object]] = []
    trained_lines: dict[str, set[str]] = {}
    for language in LANGUAGES:
        texts: dict[bool, list[dict[str, str]]] = {True: [], False: []}
        total = 0
        for page_id, page in pages:
            text = clean_text(page[language], language)
            if len(text) < MIN_PAGE_CHARS or (language != "en" and not CJK.search(text)):
                continue
            if total + len(text) > MAX_CHARS[language]:
                continue
            total += len(text)
            texts[is_held_out(page_id)].append({"id": page_id, "text": text})
        trained = {line for page in texts[False] for line in page["text"].split("\n")}
        trained_lines[language] = trained
        held_out = [new_lines(page, trained) for page in texts[True]]
        questions += next_lines(held_out, language)
        write_jsonl(OUTPUT_DIR / f"train_{language}.jsonl.gz", texts[False])
        write_jsonl(
            OUTPUT_DIR / f"heldout_{language}.jsonl.gz",
            [page for page in held_out if len(page["text"]) >= MIN_PAGE_CHARS],
        )
    write_jsonl(OUTPUT_DIR / "heldout_choice.jsonl.gz", questions)
    write_jsonl(OUTPUT_DIR / "heldout_parallel.jsonl.gz", parallel_lines(pages, trained_lines))

    for mix in MIXES:
        chosen = choose_conversations(mix, pages)
        write_jsonl(OUTPUT_DIR / f"train_{mix.name}.jsonl.gz", chosen[False])
        write_jsonl(OUTPUT_DIR / f"heldout_{mix.name}.jsonl.gz", chosen[True])


if __name__ == "__main__":
    main()
