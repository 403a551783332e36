"""Language is told by prose: code, names and headlines are on no side; an answer by its script."""

import pytest

from chatglm_ja.data import language_id
from tests.conftest import demo_texts

JAPANESE = "日本語の文章は、ひらがなとカタカナと漢字で書かれています。"
CHINESE = "中文文章只用汉字书写，偶尔引用日语的单词，例如「の」。"
ENGLISH = "This is a page that you can read, naïve or not, and all of it is to be in English."
FRENCH = "Le texte est écrit dans une langue que les lecteurs de la page ne parlent pas."
GERMAN = "Der Text ist in einer Sprache geschrieben, und das ist nicht die der Seite."
SPANISH = "El texto de la pagina trata de los libros que una persona lee con gusto."
RUSSIAN = "Русский текст написан кириллицей, а не латиницей."
CODE = "\n".join(f"if (x{i} > 0) return compute_result(x{i}, y{i}); // TODO" for i in range(30))
HEADLINES = "京都大学附属病院\n東京都千代田区丸の内一丁目\n人事異動\n令和五年度決算報告"


def fits(language: str, *texts: str) -> list[bool]:
    return language_id.fits_language(texts, language_id.code_points(texts), language).tolist()


@pytest.mark.parametrize(("language", "own"), [("ja", JAPANESE), ("zh", CHINESE), ("en", ENGLISH)])
def test_prose_is_of_its_language(language: str, own: str) -> None:
    texts = [JAPANESE, CHINESE, ENGLISH, FRENCH, GERMAN, SPANISH, RUSSIAN, "", "1234"]
    assert fits(language, *texts) == [text == own for text in texts]


def test_code_is_on_no_side() -> None:
    for language, own in {"ja": JAPANESE, "zh": CHINESE, "en": ENGLISH}.items():
        assert fits(language, f"{own}\n{CODE}") == [True]
    # Even much code that begins like a sentence.
    python = "\n".join(f"from module_{i} import name as other, if not in list" for i in range(30))
    assert fits("ja", f"{JAPANESE}\n{python}") == [True]


def test_foreign_prose_under_a_menu_is_foreign() -> None:
    for foreign in (ENGLISH, FRENCH, GERMAN, SPANISH):
        page = "\n".join(["ホーム", "使い方", *[foreign] * 5])
        assert fits("ja", page) == [False]
        assert fits("zh", page.replace("ホーム\n使い方", "首页\n使用方法")) == [False]
    assert fits("ja", "\n".join(["メニューを開く", *[RUSSIAN] * 5])) == [False]


def test_labels_that_are_not_translated_are_foreign() -> None:
    labels = "Recent colors\nCustom Palette\nWhen editing a form:\nOpenPGP signing key"
    assert fits("ja", f"{labels}\nリセット") == [False]
    assert fits("zh", f"{labels}\n重置") == [False]
    assert fits("ja", f"{labels}\n{JAPANESE}") == [True]
    calls = labels.replace("\n", "()\n")  # marks of code
    assert fits("ja", f"{calls}()\nリセット") == [True]


def test_half_of_the_prose_decides() -> None:
    page = [JAPANESE] * 4 + [CHINESE.replace("「の」", "此")] * 4
    assert fits("ja", "\n".join(page)) == [True]  # the Japanese lines are longer
    assert fits("ja", "\n".join(page[1:])) == [False]
    assert fits("en", f"{ENGLISH}\n{ENGLISH}\n{FRENCH}") == [True]
    assert fits("en", f"{ENGLISH}\n{FRENCH}\n{GERMAN}\n{SPANISH}") == [False]


def test_headlines_without_kana_are_not_chinese() -> None:
    assert fits("ja", f"{HEADLINES}\n{JAPANESE}") == [True]
    assert fits("ja", HEADLINES) == [False]  # nothing says that this is Japanese


def test_neighbors_in_a_batch_do_not_matter() -> None:
    """Texts are joined without a character between them."""
    texts = ["th", ENGLISH, "e of the", CODE, "of", "f the", FRENCH, "", JAPANESE, HEADLINES, "の"]
    for language in language_id.LANGUAGES:
        alone = [fits(language, text)[0] for text in texts]
        assert fits(language, *texts) == alone


def test_the_demos_pages_are_of_their_languages() -> None:
    """Help pages have much code, and the labels of a few Japanese and Chinese ones are English."""
    for language in language_id.LANGUAGES:
        texts = demo_texts(language, 2000)
        assert sum(fits(language, *texts)) > 0.95 * len(texts)
        for other in language_id.LANGUAGES:
            if other != language:
                assert sum(fits(other, *texts)) < 0.01 * len(texts)


@pytest.mark.parametrize(
    ("text", "languages"),
    [
        ("グラフの種類を選択します。", {"ja"}),
        ("選択「書式」", {"zh"}),  # nothing says that this is Japanese
        ("选择「格式」选项卡。", {"zh"}),
        ("Choose Format - Page.", {"en"}),
        ("100000", set()),
        ("", set()),
    ],
)
def test_the_language_of_an_answer_is_its_script_s(text: str, languages: set[str]) -> None:
    matches = {x for x in ("ja", "zh", "en") if language_id.in_language([text], x) == [True]}
    assert matches == languages
    assert language_id.in_language([text], "code") is None
