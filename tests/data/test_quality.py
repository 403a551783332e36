"""Every kind of junk is dropped, by the rule that is meant for it; good pages are kept."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from chatglm_ja.data import filters, language_id, quality
from chatglm_ja.data.cleaning import Fate
from chatglm_ja.data.settings import PrepareDataConfig
from chatglm_ja.errors import ConfigError
from chatglm_ja.sources import Source
from tests.conftest import PROJECT, demo_texts

RULES = {
    "menu": Fate.NO_SENTENCES,
    "repeated line": Fate.REPEATED,
    "repeated phrase": Fate.REPEATED,
    "UTF-8 read as CP1252": Fate.MOJIBAKE,
    "replacement characters": Fate.MOJIBAKE,
    "symbols": Fate.SYMBOLS,
    "numbers": Fate.SYMBOLS,
    "keywords": Fate.NO_SENTENCES,
    "addresses": Fate.NO_SENTENCES,
    "boilerplate": Fate.BOILERPLATE,
    "search results": Fate.TRUNCATED,
    "random characters": Fate.UNNATURAL,
}


@pytest.fixture(scope="module")
def junk() -> Iterator[ModuleType]:
    """Import benchmarks/data_filters.py with its folder on the import path, as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PROJECT / "benchmarks"))
        yield importlib.import_module("data_filters")
        for name in ("data_filters", "measuring"):
            del sys.modules[name]


def judge(language: str, *texts: str) -> list[Fate]:
    return quality.judge(texts, language_id.code_points(texts), language)


@pytest.mark.parametrize("language", ["ja", "zh", "en"])
def test_junk_is_dropped(junk: ModuleType, language: str) -> None:
    for seed in range(3):
        pages = junk.make_junk(language, seed)
        assert len(pages) > 16
        for kind, page in pages.items():
            source = Source(language, "unused", quality="web")
            (fate,) = filters.apply_filters([page], language_id.code_points([page]), source, 32)
            assert fate is not Fate.KEPT, kind
        # Read as Latin-1, a page of ja is not in its language, whatever its quality.
        assert {kind: judge(language, pages[kind])[0] for kind in RULES} == RULES


@pytest.mark.parametrize("language", ["ja", "zh", "en"])
def test_good_pages_are_kept(junk: ModuleType, language: str) -> None:
    prose = junk.PROSE[language]
    code = "\n".join(f"value_{i} = compute({i} * 3 + offset[{i}])" for i in range(20))
    assert judge(language, prose, f"{prose}\n{code}\n{prose[:40]}…") == [Fate.KEPT, Fate.KEPT]
    pages = demo_texts(language, 2000)
    fits = language_id.fits_language(pages, language_id.code_points(pages), language)
    good = [page for page, ok in zip(pages, fits, strict=True) if ok]
    assert judge(language, *good).count(Fate.KEPT) >= 0.99 * len(good)


def test_other_languages_keep_their_letters() -> None:
    """Diacritics are no mojibake, and no rule asks for English words."""
    texts = {
        "fr": "Le château est à côté de l’école, où l’été dernier des élèves âgés ont chanté. ",
        "pt": "As nações não são irmãs: há ligações, mas também há separações e corações vãos. ",
        "ru": "Русский текст написан кириллицей, а не латиницей, и его нельзя терять. ",
        "ko": "이 문장은 한국어로 쓰여 있으며 필터가 버려서는 안 된다. ",
    }
    for language, sentence in texts.items():
        page = "\n".join(f"{sentence}{chr(0x430 + i)}" for i in range(3))
        assert judge(language, page) == [Fate.KEPT], language


def test_repeated_runs_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with a set of the runs of each text, which ends at the text's end."""
    draw = np.random.default_rng(0)
    texts = [
        "".join(draw.choice(list("あいう ab\n1、"), size)) for size in draw.integers(1, 90, 60)
    ]
    texts = [text * int(draw.integers(1, 5)) for text in texts]
    shares = []
    for text in texts:
        kept = "".join(character for character in text if character.isalnum())
        runs = [kept[i : i + 16] for i in range(len(kept) - 15)]
        shares.append(1 - len(set(runs)) / len(runs) if runs else 0)
    page = quality._Pages(texts, language_id.code_points(texts))
    found = quality._repeated_share(page, language_id.is_letter(page.scripts))
    assert found == pytest.approx(np.array(shares))
    assert max(shares) > 0.5


def test_neighbors_in_a_batch_do_not_matter(junk: ModuleType) -> None:
    for language in ("ja", "zh", "en"):
        pages = [*junk.make_junk(language, 0).values(), "", "Ã", "。", *junk.PROSE.values()]
        # A page whose only sentence ends with the page.
        pages += [f"{pages[0]}\n{junk.PROSE['en']}"[:-1].replace(". ", ", ") + ".", "A"]
        alone = [judge(language, page)[0] for page in pages]
        assert judge(language, *pages) == alone


def test_only_sources_of_the_web_are_judged(junk: ModuleType) -> None:
    page = junk.make_junk("ja", 0)["menu"]
    codes = language_id.code_points([page])
    web, plain = Source("ja", "a.txt", quality="web"), Source("ja", "a.txt")
    assert filters.apply_filters([page], codes, plain, 32) == [Fate.KEPT]
    assert filters.apply_filters([page], codes, web, 32) == [Fate.NO_SENTENCES]
    # What is decided earlier counts.
    assert filters.apply_filters([page], codes, web, 10**6) == [Fate.SHORT]
    english = Source("en", "a.txt", quality="web")
    assert filters.apply_filters([page], codes, english, 32) == [Fate.LANGUAGE]


def test_conversations_are_not_judged() -> None:
    source = Source("ja", "talks.jsonl", quality="web")
    with pytest.raises(ConfigError, match="ja/talks: quality web is for pretraining texts"):
        PrepareDataConfig(
            output_dir=Path("out"), tokenizer=Path("tokenizer"), total_tokens=0,
            sft_sources=(source,), sft_shares=("ja=1",), sft_examples=5,
        )  # fmt: skip
