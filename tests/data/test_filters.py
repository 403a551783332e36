"""The first filter that matches decides, and each drops what it is named for."""

from chatglm_ja.data import filters, language_id
from chatglm_ja.data.cleaning import Fate
from chatglm_ja.sources import Source

TEXTS = [
    "",
    "短い",
    "12345678901234567890",
    "日本語の文章は、ひらがなとカタカナと漢字で書かれています。",
    "Python の print 関数は標準出力に書きます",
]


def test_the_first_filter_that_matches_decides() -> None:
    codes, source = language_id.code_points(TEXTS), Source("ja", "unused")
    assert filters.apply_filters(TEXTS, codes, source, 10) == [
        Fate.EMPTY, Fate.SHORT, Fate.LANGUAGE, Fate.KEPT, Fate.KEPT,
    ]  # fmt: skip
    for unchecked in (
        filters.apply_filters(TEXTS, codes, source, 1, check_language=False),
        filters.apply_filters(TEXTS, codes, Source("ru", "unused"), 1),
    ):
        assert unchecked == [Fate.EMPTY, *[Fate.KEPT] * 4]
    assert filters.apply_filters([], language_id.code_points([]), source, 10) == []
