"""The WikiText corpora's markup is undone, and nothing else changes."""

import pytest

from chatglm_ja.data import wikitext


@pytest.mark.parametrize(
    ("line", "restored"),
    [
        (" = Robert Boulter = \n", "Robert Boulter"),
        (" = = = Early life = = = \n", "Early life"),
        (" in 1978 @-@ 79 , 1 @,@ 000 and 2 @.@ 5 . \n", "in 1978-79, 1,000 and 2.5."),
        (" ( Japanese : 戦場 , lit . Valkyria ) , \n", "(Japanese: 戦場, lit. Valkyria),"),
        (" the game 's story and players ' choice \n", "the game's story and players ' choice"),
        (' called " Calamaty Raven " and " Gallia " . \n', 'called "Calamaty Raven" and "Gallia".'),
        (" x = 5 and y = 6 \n", "x = 5 and y = 6"),
        (" mail me @ home @-@ or not \n", "mail me @ home-or not"),
        ("", ""),
    ],
)
def test_lines(line: str, restored: str) -> None:
    assert wikitext.restore_line(line) == restored


def test_lines_before_the_first_title_are_an_article() -> None:
    lines = [(1, " An end . \n"), (2, " = Title = \n"), (3, "\n"), (4, " Text . \n")]
    assert list(wikitext.join_articles(lines)) == [(1, "An end."), (2, "Title\nText.")]
    assert list(wikitext.join_articles([])) == []
