"""Undoing the markup of the WikiText corpora, whose rows are lines and whose words are spaced.

     = Robert Boulter =                          Robert Boulter
                                                 An English film, television and
     An English film , television and    ->      theatre actor (born in 1978-79).
     theatre actor ( born in 1978 @-@ 79 ) .     Career
     = = Career = =

The corpora (Merity et al. 2016, arXiv 1609.07843) put spaces around punctuation and write "@-@",
"@,@" and "@.@" for a hyphen inside a word and the separators inside a number. Double quotes are
taken as opening and closing in turn, which tells which of their spaces to remove.
"""

import re
from collections.abc import Iterable, Iterator

# A title has one = on each side, a section's heading two or more.
_TITLE = re.compile(r" = (?!= )(.*\S) = ?\n?")
# At most six: without a limit, matching a line of = takes cubic time.
_HEADING = re.compile(r" (?:= ){1,6}(.*?)(?: =){1,6} ?\n?")
_JOINED = re.compile(r" @([-,.])@ ")
_CLOSING = re.compile(r" ([,.;:!?%)\]}]|'(?:s|t|re|ve|ll|d|m)\b|n't\b)")
_OPENING = re.compile(r"([(\[{$£]) ")
_QUOTED = re.compile(r'" (.*?) "', re.DOTALL)


def restore_line(line: str) -> str:
    """Return a line as it was written before the corpus was tokenized."""
    if heading := _HEADING.fullmatch(line):
        line = heading[1]
    line = _JOINED.sub(r"\1", line.strip())
    line = _CLOSING.sub(r"\1", line)
    line = _OPENING.sub(r"\1", line)
    # Without this limit, each opening quote after the last closing one is a search to the end.
    end = line.rfind(' "') + 2
    return _QUOTED.sub(r'"\1"', line[:end]) + line[end:]


def join_articles(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Join numbered lines into restored articles, each with the number of its first line."""
    first = 0
    article: list[str] = []
    for number, line in lines:
        if _TITLE.fullmatch(line) and article:
            yield first, "\n".join(article)
            article = []
        if text := restore_line(line):
            if not article:
                first = number
            article.append(text)
    if article:
        yield first, "\n".join(article)
