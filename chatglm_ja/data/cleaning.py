"""Cleaning texts, and the fates of step 4's records.

A cleaned text has Unicode's canonical form, no control or invisible formatting characters, one
kind of line break, no blanks (space, tab, ideographic space) at the ends of lines and at most one
empty line in a row. Blanks inside a line stay: code and Japanese paragraphs are indented.

To add a filter, add a member to `Fate` and a condition in filters.py, quality.py or
prepare_conversations.py. The counts, log lines, columns of data_report.html and their explanations
follow from the enum.
"""

import re
import unicodedata

from chatglm_ja.settings import Choice

# Control characters other than tab and line break, soft hyphens, zero-width and direction marks,
# byte-order marks, noncharacters, U+FFFD's neighbors in the specials block. Joiners stay: emoji and
# names use them.
_REMOVED = (
    "\x01-\x08\x0e-\x1f\x7f\x80-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\ufeff\ufff0-\ufffb\ufffe\uffff\ufdd0-\ufdef"
)
_BREAKS = "\r\x0b\x0c\x85\u2028\u2029"
_NO_BREAK_SPACE = "\xa0"
_UNWANTED = re.compile(f"[{_REMOVED}{_BREAKS}{_NO_BREAK_SPACE}]")
_BREAK = re.compile(f"\r\n|[{_BREAKS}]")
_EMPTY_LINES = re.compile("\n{3,}")
_BLANKS = " \t\u3000"


class Fate(Choice):
    """The fates of a record, in the order in which they are decided.

    Step 4's report explains them by their phrases, which say what such records are.
    """

    REJECTED = "rejected", "unreadable, of the wrong type, or with the id of an earlier record"
    # Texts.
    EMPTY = "empty", "empty after cleaning"
    SHORT = "short", "of fewer characters than --min-characters"
    LANGUAGE = "language", "with less prose in their language than in others"
    MOJIBAKE = "mojibake", "decoded in a wrong encoding (quality: web)"
    SYMBOLS = "symbols", "of few letters (quality: web)"
    REPEATED = "repeated", "that repeat themselves (quality: web)"
    BOILERPLATE = "boilerplate", "of copyrights and the like (quality: web)"
    TRUNCATED = "truncated", "of lines that end in an ellipsis (quality: web)"
    NO_SENTENCES = "no_sentences", "of menus, keywords or tables (quality: web)"
    UNNATURAL = "unnatural", "with few of the words that all prose has (quality: web)"
    CONTAMINATED = "contaminated", "with 13 tokens in a row of an evaluation text, too much to cut"
    # Conversations.
    NO_ANSWER = "no answer at the end", "with a last message that is not the assistant's"
    TOO_LONG = (
        "too long",
        "with a last exchange that exceeds --max-length, or with --long-conversations drop as a "
        "whole",
    )
    UNTRAINED = "no trained answer", "with no answer that the record lets be trained"
    # Both.
    DUPLICATE = "duplicate", "equal to an earlier one of any source"
    NEAR_DUPLICATE = "near_duplicate", "much like an earlier text (--near-duplicates)"
    KEPT = "kept", "left to choose from, for training and validation"


def clean(text: str, unicode_form: str) -> str:
    """Return the cleaned text; `unicode_form` is NFC, NFKC or none."""
    text = clean_characters(text, unicode_form)
    if any(blank + "\n" in text for blank in _BLANKS):
        text = "\n".join(line.rstrip(_BLANKS) for line in text.split("\n"))
    if "\n\n\n" in text:
        text = _EMPTY_LINES.sub("\n\n", text)
    return text.rstrip(_BLANKS + "\n").lstrip("\n")


def clean_characters(text: str, unicode_form: str) -> str:
    """Return the text with cleaned characters; its blanks and empty lines stay as they are."""
    if _UNWANTED.search(text):
        text = _BREAK.sub("\n", text).replace(_NO_BREAK_SPACE, " ")
        text = _UNWANTED.sub("", text)
    if unicode_form != "none" and not text.isascii():
        text = unicodedata.normalize(unicode_form, text)  # type: ignore[arg-type]
    return text
