"""What can become of a record of step 4: a filter that drops it, or a place in the training data.

A new filter is a member here and a condition in cleaning.py or prepare_conversations.py; counts,
log lines and the columns of data_report.html follow from this list.
"""

from enum import StrEnum


class Fate(StrEnum):
    """The fates of a record, in the order in which they are decided."""

    REJECTED = "rejected"  # unreadable, of the wrong type, or with the id of an earlier record
    # Texts, see cleaning.py.
    EMPTY = "empty"  # nothing is left after cleaning
    SHORT = "short"  # fewer than --min-characters
    LANGUAGE = "language"  # not written in the script of its language
    CONTAMINATED = "contaminated"  # shares 13 tokens in a row with an evaluation text
    # Conversations.
    NO_ANSWER = "no answer at the end"  # the last message is not the assistant's
    TOO_LONG = "too long"  # the last exchange alone exceeds --max-length; with
    # --long-conversations drop, the whole conversation does
    # Both.
    DUPLICATE = "duplicate"  # of an earlier text or conversation of any source
    NEAR_DUPLICATE = "near_duplicate"  # texts only
    KEPT = "kept"
