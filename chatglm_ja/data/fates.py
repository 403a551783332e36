"""The fates of step 4's records: dropped by one of the filters, or kept.

To add a filter, add a member here and a condition in cleaning.py or prepare_conversations.py. The
counts, log lines and columns of data_report.html follow from this list.
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
    # The last exchange exceeds --max-length or, with --long-conversations drop, the whole does.
    TOO_LONG = "too long"
    # Both.
    DUPLICATE = "duplicate"  # of an earlier text or conversation of any source
    NEAR_DUPLICATE = "near_duplicate"  # texts only
    KEPT = "kept"
