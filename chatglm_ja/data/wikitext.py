"""The WikiText corpora's markup, undone: their rows are lines, their words are set apart.

     = Robert Boulter =                          Robert Boulter
                                                 An English film, television and
     An English film , television and    ->      theatre actor (born in 1978-79).
     theatre actor ( born in 1978 @-@ 79 ) .     Career
     = = Career = =

The corpora (Merity et al. 2016, arXiv 1609.07843) put spaces around punctuation and write "@-@",
"@,@" and "@.@" for a hyphen inside a word and the separators inside a number. Which side of a
double quote its space belonged to is told by counting the quotes of the line.
"""

import re
from collections.abc import Iterable, Iterator

# A title has one = on each side, the headings of its sections two or more.
_TITLE = re.compile(r" = (?!= )(.*\S) = ?\n?")
# So many and no more: with any number, a line of nothing else takes time of its length cubed.
_HEADING = re.compile(r" (?:= ){1,6}(.*?)(?: =){1,6} ?\n?")
_JOINED = re.compile(r" @([-,.])@ ")
_CLOSING = re.compile(r" ([,.;:!?%)\]}]|'(?:s|t|re|ve|ll|d|m)\b|n't\b)")
_OPENING = re.compile(r"([(\[{$£]) ")
_QUOTED = re.compile(r'" (.*?) "', re.DOTALL)


def restore(line: str) -> str:
    """A line as it was written before the corpus was tokenised."""
    if heading := _HEADING.fullmatch(line):
        line = heading[1]
    line = _JOINED.sub(r"\1", line.strip())
    line = _CLOSING.sub(r"\1", line)
    line = _OPENING.sub(r"\1", line)
    # Where none closes any more, every opening one would be searched for to the end of the line.
    end = line.rfind(' "') + 2
    return _QUOTED.sub(r'"\1"', line[:end]) + line[end:]


def articles(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Numbered lines as numbered articles, restored; an article begins at its title's line."""
    first = 0
    article: list[str] = []
    for number, line in lines:
        if _TITLE.fullmatch(line) and article:
            yield first, "\n".join(article)
            article = []
        if text := restore(line):
            if not article:
                first = number
            article.append(text)
    if article:
        yield first, "\n".join(article)
