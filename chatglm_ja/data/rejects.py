"""Bad records: counted by reason, named, and refused if a source has too many.

Step 4 writes all of them to a file (resume.py). Other steps name the first of each source.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from chatglm_ja.data.readers import LOST_FILE, Reject
from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source

log = logging.getLogger(__name__)

# Reading stops early if most of at least this many records of a source are bad.
EARLY_RECORDS = 20_000


@dataclass(eq=False)  # two counts of the same source are not the same count
class RejectCount:
    """How many records of a source were read, bad ones included, and the reasons of these.

    `first` says where the first bad one is.
    """

    source: Source
    read: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: str = ""

    def add(self, file: str, number: int, reject: Reject) -> None:
        """Count a bad record; warn if it stands for the rest of its file."""
        self.reasons[reject.reason] += 1
        self.first = self.first or f"{file} record {number}: {reject.reason}, {reject.detail}"
        if reject.reason in LOST_FILE:
            log.warning("%s: %s, %s: %s", self.source.title, file, reject.reason, reject.detail)

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {count:,}" for name, count in self.reasons.most_common())
        return f"{self.source.title}: {self.reasons.total():,} of {self.read:,} records ({shown})"


def is_hopeless(read: int, bad: int, max_share: float) -> bool:
    """Return whether a source that is still being read will be refused."""
    return read >= EARLY_RECORDS and bad > max(0.5, max_share) * read


def check_rejects(counts: Iterable[RejectCount], max_share: float, report: str = "") -> None:
    """Raise DataError if a source has no records, or if more than `max_share` of them are bad.

    `report` is the file that lists all bad records; without one, the message names the first.
    """
    too_many = []
    for count in counts:
        if not count.read:
            where = count.source.where
            condition = f" where {'='.join(where)}" if where else ""
            raise DataError(
                f"source {count.source.title} ({count.source}) holds no record{condition}"
            )
        if count.reasons.total() > max_share * count.read:
            too_many.append(count)
    if not too_many:
        return
    fix = "fix them or raise --max-rejects"
    if any("duplicate id" in count.reasons for count in too_many):
        fix += "; if these are not ids, set id_column: null for the source in a YAML file"
    firsts = f"the first: {'; '.join(count.first for count in too_many)}"
    places = f"see {report}, then" if report else f"{firsts}; to go on,"
    raise DataError(
        f"more than {max_share:.2%} of the records are bad in {'; '.join(map(str, too_many))}: "
        f"{places} {fix}"
    )
