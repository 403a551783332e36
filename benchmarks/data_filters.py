"""Measure step 4's filters of language and quality: what they drop by mistake, and their speed.

    python benchmarks/data_filters.py --sources ja=ja.jsonl zh=zh.jsonl en=en.jsonl fr=fr.jsonl

Language. The pages of a source are labelled by its language and a rule that can be checked by hand:
a page of ja or zh is in its language if the lines with kana, or with Han and without kana, have at
least as many bytes of letters as the English lines: two words or more, up to a full stop, a colon,
a question or exclamation mark, or without a mark of code. Other pages of such a source are foreign.
Pages of all other sources are foreign, too; sources other than ja, zh and en are needed to judge
`en`. The table compares the filter with the test of the script of a text as a whole, and for pages
of en or in other languages with py3langid.

Quality. The good pages are those that the language filter keeps. The junk is made up: --junk-pages
of every kind and language. The tables show how many good pages and what junk each rule drops.

Speed. CPU seconds per GB of text, each the least of --repeats runs: of the test of the script, of
both filters, and of a whole chunk of step 4 with --tokenizer.
"""

import argparse
import base64
import functools
import json
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import measuring
import numpy as np
from measuring import Ratio
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from chatglm_ja.cli import run
from chatglm_ja.data import cleaning, language_id, prepare_texts, quality, readers
from chatglm_ja.data.cleaning import Fate
from chatglm_ja.data.settings import UNICODE_FORM, PrepareDataConfig
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.data.token_store import ChunkTask
from chatglm_ja.sources import Source

MIN_CHARACTERS = 32
BATCH = 2**20  # characters, as in step 4

# The words, prose and phrases of junk: of a copyright, a link, a log, a year, a month, a currency
# and an address.
WORDS = {
    "ja": "新着 ランキング 人気 商品 会社 情報 お知らせ サービス 採用 旅行 東京 大阪 料理 レシピ "
    "映画 音楽 健康 写真 天気 スポーツ 地図 予約 口コミ 中古 自動車 保険 格安 送料無料 比較",
    "zh": "首页 新闻 产品 公司 服务 招聘 联系我们 旅游 北京 上海 美食 菜谱 电影 音乐 健康 图片 "
    "天气 体育 地图 预订 点评 二手 汽车 保险 优惠 包邮 免费 对比 推荐 网购 价格 登录 注册 论坛",
    "en": "home news products company services careers contact travel london tokyo recipes movies "
    "music health photos weather sports maps booking reviews used cars insurance discount free "
    "shipping compare best cheap online prices login register forum",
}  # fmt: skip
PROSE = {
    "ja": "このページでは、初めての方にもわかりやすく使い方を説明しています。"
    "まず画面の右上にある設定を開いてください。次に、表示したい項目を選び、保存を押します。"
    "変更はすぐに反映されますので、もう一度確認しておくと安心です。",
    "zh": "本页面向初学者说明使用方法。首先请打开屏幕右上角的设置，然后选择您想要显示的项目，"
    "并且点击保存。更改会立即生效，因此最好再确认一次。如果仍然无法显示，请与我们的客服联系。",
    "en": "This page explains how to use the service — even if it’s your first time. First, open "
    "the “settings” at the top right. Then choose the items that you’d like to see, and press "
    "“save”. Changes take effect at once, so it’s a good idea to check them again.",
}
PHRASES = {
    "ja": ("無断転載を禁じます。", "プライバシーポリシー", "サーバーへの接続が切れました",
           "年", "月", "円", "東京都千代田区丸の内"),
    "zh": ("版权所有，保留所有权利。", "隐私政策", "与服务器的连接已断开",
           "年", "月", "元", "北京市朝阳区建国门外大街"),
    "en": ("All rights reserved.", "Privacy policy", "lost connection to the server",
           "", "", "USD", "Baker Street, London"),
}  # fmt: skip
# The encoding of a language before UTF-8, and one in which its UTF-8 is often read by mistake.
ENCODINGS = {"ja": ("cp932", "cp932"), "zh": ("gb18030", "gbk"), "en": ("cp1252", "mac_roman")}
LETTERS = {
    "ja": [*map(chr, [*range(0x3041, 0x3097), *range(0x30A1, 0x30F7), *range(0x4E00, 0x9000)])],
    "zh": [*map(chr, range(0x4E00, 0x9000))],
    "en": [*"abcdefghijklmnopqrstuvwxyz     "],
}

KANA = re.compile(r"[\u3041-\u30ff]")
CJK = re.compile(r"[\u3041-\u30ff\u4e00-\u9fff]")
WORD = re.compile(r"[A-Za-z]{2,}")
CODE = re.compile(r"[()\[\]{}<>=;_$@#|\\]")


def make_junk(language: str, seed: int) -> dict[str, str]:
    """Return a page of every kind of junk, cleaned as step 4 does it."""
    draw = random.Random(f"{language} {seed}")
    words, prose = WORDS[language].split(), PROSE[language]
    rights, policy, event, year, month, currency, street = PHRASES[language]
    old_encoding, mistaken = ENCODINGS[language]
    is_english = language == "en"
    space, stop, comma = (" ", ". ", ", ") if is_english else ("", "。", "、")

    def some(count: int, between: str = space) -> str:
        return between.join(draw.choices(words, k=count))

    def numbers(count: int, low: int, high: int) -> list[int]:
        return [draw.randint(low, high) for _ in range(count)]

    def lines(count: int, line: Callable[[], str]) -> str:
        return "\n".join(line() for _ in range(count))

    def misread(encoding: str, other: str) -> str:
        return (3 * prose).encode(encoding).decode(other, "ignore")

    def snippet() -> str:
        start, end = draw.randint(0, 20), draw.randint(50, 70)
        return f"{some(3)} {prose[start:end]}{draw.choice(['…', ' ...'])}"

    def event_line() -> str:
        day, hour, minute, second, process = numbers(5, 10, 28)
        return f"2024-01-{day} {hour}:{minute}:{second} [{process}] WARN {some(1)}: {event}"

    def address() -> str:
        block, house, *phone = numbers(4, 1, 99)
        return f"{some(2)} {block}-{house} {street} 03-{phone[0]:04}-{phone[1]:04}"

    def calendar_month(number: int) -> str:
        weeks = [" ".join(map(str, range(day, day + 7))) for day in range(1, 29, 7)]
        return "\n".join([f"2024{year} {number}{month}", *weeks])

    pages = {
        "menu": lines(120, lambda: some(draw.randint(1, 3))),
        "repeated line": "\n".join([some(5), *30 * [prose[:70]]]),
        "repeated phrase": some(8) + 30 * (some(4) + stop),
        "UTF-8 read as Latin-1": misread("utf-8", "latin-1"),
        "UTF-8 read as CP1252": misread("utf-8", "cp1252"),
        "UTF-8 read as an old encoding": misread("utf-8", mistaken),
        "an old encoding read as UTF-8": (3 * prose)
        .encode(old_encoding)
        .decode("utf-8", "replace"),
        "an old encoding read as Latin-1": misread(old_encoding, "latin-1"),
        "replacement characters": "".join(
            "\ufffd" if draw.random() < 0.1 else character for character in 3 * prose
        ),
        "symbols": "".join(draw.choices("★☆◆◇■□●○▲▼※→←↑↓♪♥!?#$%&*+=~^|・…", k=400)) + some(3),
        "keywords": some(200, comma),
        "prices": lines(80, lambda: f"{some(2)} {draw.randint(100, 99999):,} {currency}"),
        "numbers": lines(60, lambda: " ".join(map(str, numbers(8, 0, 10**6)))),
        "boilerplate": lines(
            30, lambda: f"© {draw.randint(1999, 2024)} {some(2)} {rights} {policy}"
        ),
        "search results": lines(30, snippet),
        "log": lines(60, event_line),
        "base64": base64.encodebytes(draw.randbytes(2000)).decode(),
        "calendar": "\n".join(map(calendar_month, range(1, 13))),
        "tag cloud": " ".join(f"{some(1)}({draw.randint(1, 500)})" for _ in range(200)),
        "drawing": lines(40, lambda: "".join(draw.choices(r" _/\|-=+*#.o", k=60))) + some(3),
        "addresses": lines(60, address),
        "random characters": lines(
            20, lambda: "".join(draw.choices(LETTERS[language], k=80)) + stop.strip()
        ),
    }
    if is_english:  # CP1252 read as Latin-1 loses its quotation marks, and reads well
        del pages["an old encoding read as Latin-1"]
    return {kind: cleaning.clean(page, UNICODE_FORM) for kind, page in pages.items()}


def judge_junk(language: str, page: str) -> Fate:
    """Return the fate of a page of junk in a source of the web."""
    codes = language_id.code_points([page])
    if not language_id.fits_language([page], codes, language)[0]:
        return Fate.LANGUAGE
    return quality.judge([page], codes, language)[0]


def is_own(text: str, language: str) -> bool:
    """Return whether a page is in its language, by the rule that the module describes."""
    own = english = 0
    for line in text.split("\n"):
        has_kana, cjk = bool(KANA.search(line)), len(CJK.findall(line))
        if cjk and has_kana == (language == "ja"):
            own += 3 * cjk
        elif cjk and has_kana:
            english += 3 * cjk  # Japanese on a Chinese page
        elif len(words := WORD.findall(line)) >= 2 and (
            line.rstrip().endswith((".", "!", "?", ":")) or not CODE.search(line)
        ):
            english += sum(map(len, words))
    return 0 < own >= english


def in_batches(texts: Sequence[str]) -> Iterable[list[str]]:
    """Yield the texts in the batches in which step 4 filters them."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def fits(texts: Sequence[str], language: str) -> np.ndarray:
    """Return the language filter's decisions."""
    parts = [
        language_id.fits_language(batch, language_id.code_points(batch), language)
        for batch in in_batches(texts)
    ]
    return np.concatenate([np.zeros(0, bool), *parts])


def compare_languages(texts: dict[Source, list[str]]) -> dict[tuple[str, str], tuple[int, int]]:
    """Print the table of languages; return drops and keeps by mistake: by script, then by lines."""
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    rows, wrong = [], {}
    for language in language_id.LANGUAGES:
        pages, labels = [], []
        for source, group in texts.items():
            is_source = source.language == language
            for text in group:
                label = is_source and (language == "en" or is_own(text, language))
                # What is foreign on a page of another language is not known.
                is_other = source.language in ("ja", "zh") and not is_source
                if not is_other or is_own(text, source.language):
                    pages.append(text)
                    labels.append(label)
        own = np.array(labels)
        ways = {
            "script": np.array(language_id.in_language(pages, language)),
            "prose": fits(pages, language),
        }
        if language == "en":
            found = [identifier.classify(page)[0] == "en" for page in pages]
            ways["py3langid"] = np.array(found)
        for way, kept in ways.items():
            drops, keeps = int((own & ~kept).sum()), int((~own & kept).sum())
            wrong[language, way] = drops, keeps
            rows.append(
                [language, way, f"{own.sum():,}", f"{drops:,} ({drops / own.sum():.1%})",
                 f"{(~own).sum():,}", f"{keeps:,} ({keeps / max((~own).sum(), 1):.1%})"]
            )  # fmt: skip
    head = ["language", "decided by", "own pages", "dropped", "foreign pages", "kept"]
    print(measuring.table(head, rows), end="\n\n")
    return wrong


def compare_quality(texts: dict[Source, list[str]], junk_pages: int) -> tuple[float, float]:
    """Print the tables of quality; return the share of good pages lost, and of junk dropped."""
    rows, good, lost = [], 0, 0
    for source, group in texts.items():
        if source.language not in language_id.LANGUAGES:
            continue
        kept = [t for t, ok in zip(group, fits(group, source.language), strict=True) if ok]
        fates = Counter(
            fate
            for batch in in_batches(kept)
            for fate in quality.judge(batch, language_id.code_points(batch), source.language)
        )
        dropped = len(kept) - fates.pop(Fate.KEPT, 0)
        good, lost = good + len(kept), lost + dropped
        rules = ", ".join(f"{fate} {count}" for fate, count in fates.most_common())
        rows.append(
            [source.title, f"{len(kept):,}", f"{dropped} ({dropped / len(kept):.2%})", rules]
        )
    print(measuring.table(["good pages", "pages", "dropped", "by"], rows), end="\n\n")
    found = {
        (kind, language, judge_junk(language, page))
        for language in PROSE
        for seed in range(junk_pages)
        for kind, page in make_junk(language, seed).items()
    }
    kinds = list(dict.fromkeys(kind for language in PROSE for kind in make_junk(language, 0)))
    rows = [
        [kind, *(", ".join(sorted(f for k, own, f in found if (k, own) == (kind, language)))
                 for language in PROSE)]
        for kind in kinds
    ]  # fmt: skip
    print(measuring.table(["junk", *PROSE], rows), end="\n\n")
    missed = {kind for kind, _, fate in found if fate is Fate.KEPT}
    return lost / good, 1 - len(missed) / len(kinds)


def measure_speed(
    texts: dict[Source, list[str]], repeats: int, tokenizer: Path | None
) -> dict[str, float]:
    """Print CPU seconds per GB of each language; return the totals."""
    rows, totals = [], Counter[str]()
    for language in language_id.LANGUAGES:
        group = [t for source, own in texts.items() if source.language == language for t in own]
        batches = [(batch, language_id.code_points(batch)) for batch in in_batches(group)]
        gigabytes = sum(len(text.encode()) for text in group) / 1e9

        def seconds(work: Callable[[], object], gigabytes: float = gigabytes) -> float:
            times = []
            for _ in range(repeats):
                start = time.process_time()
                work()
                times.append(time.process_time() - start)
            return min(times) / gigabytes

        def judge(
            way: Callable[..., object], language: str = language, batches: Any = batches
        ) -> Callable[[], object]:
            return lambda: [way(*batch, language) for batch in batches]

        found = {
            "script": seconds(judge(lambda texts, _, name: language_id.in_language(texts, name))),
            "prose": seconds(judge(language_id.fits_language)),
            "quality": seconds(judge(quality.judge)),
        }
        if tokenizer:
            found["step 4, a chunk"] = seconds(
                functools.partial(tokenize, group, language, tokenizer)
            )
        totals.update({name: value * gigabytes for name, value in found.items()})
        rows.append([language, f"{gigabytes * 1000:.1f}", *(f"{v:.1f}" for v in found.values())])
    print(measuring.table(["CPU s/GB", "MB", *totals], rows))
    return dict(totals)


def tokenize(texts: Sequence[str], language: str, tokenizer: Path) -> None:
    """Tokenize texts as step 4 does it, without quality filters."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "texts.jsonl"
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        path.write_text("".join(lines), encoding="utf-8")
        source = Source(language, str(path))
        config = PrepareDataConfig(
            output_dir=path.parent, tokenizer=tokenizer, sources=(source,),
            shares=(f"{language}=1",), total_tokens=1000, sft_examples=0,
        )  # fmt: skip
        for number, chunk in enumerate(readers.read_chunks(source)):
            task = ChunkTask(chunk, source, 0, path.with_name(str(number)))
            prepare_texts.tokenize_texts(config, None, task)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sources", nargs="+", type=Source.parse, required=True)
    parser.add_argument("--tokenizer", type=Path, help="output folder of step 2")
    parser.add_argument("--junk-pages", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    texts = {
        source: [text for text in SourceReader().texts(source) if len(text) >= MIN_CHARACTERS]
        for source in options.sources
    }
    wrong = compare_languages(texts)
    lost, found = compare_quality(texts, options.junk_pages)
    speed = measure_speed(texts, options.repeats, options.tokenizer)
    mistakes = {way: sum(sum(n) for (_, w), n in wrong.items() if w == way) for _, way in wrong}
    measuring.conclude(
        [
            Ratio("mistakes of the language filter, to those by script",
                  mistakes["prose"] / max(mistakes["script"], 1)),
            Ratio("good pages that the quality filters drop", lost, "0.01 or below"),
            Ratio("kinds of junk that they drop", found, "1"),
        ],
        speed=speed,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
