"""Step 4's work in progress: folders that a later run goes on with, and the file of bad records."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatglm_ja.errors import DataError
from chatglm_ja.index import Index
from chatglm_ja.units import FORMAT


def open_folders(root: Path, **contents: Mapping[str, Any]) -> dict[str, Path]:
    """Folders below `root` for work in progress, each named by what shapes its content.

    What an earlier run finished is there if it had the same settings and inputs; what other ones
    left is removed.
    """
    folders = {}
    for name, content in contents.items():
        text = json.dumps([FORMAT, content], sort_keys=True, default=str)
        folders[name] = root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if root.exists():
        for path in root.iterdir():
            if path not in folders.values():
                shutil.rmtree(path)
    for path in folders.values():
        path.mkdir(parents=True, exist_ok=True)
    return folders


def close(root: Path, finished: Path) -> None:
    """Move the files of the folder `finished` beside the workspace, and remove the workspace."""
    for path in finished.iterdir():
        path.rename(root.parent / path.name)
    shutil.rmtree(root)


class Rejects:
    """The file of all bad records, and the limit of their share.

    path        the file, to be published with the result
    report      where a copy is left when the limit is passed and nothing is published
    max_share   of a source's records
    """

    def __init__(self, path: Path, report: Path, max_share: float) -> None:
        self.path, self.report, self.max_share = path, report, max_share
        path.write_bytes(b"")
        report.unlink(missing_ok=True)

    def check(self, index: Index) -> None:
        """Write those of an index; DataError when one of its sources has more than it may."""
        reasons: dict[str, Counter[str]] = {}
        with open(self.path, "a", encoding="utf-8") as file:
            for reject in index.rejects():
                reasons.setdefault(reject["source"], Counter())[reject["reason"]] += 1
                file.write(json.dumps(reject, ensure_ascii=False) + "\n")
        problems = []
        for number, source in enumerate(index.sources):
            bad, read = index.counts(number)["rejected"], index.records_read(number)
            if bad > self.max_share * read:
                found = ", ".join(
                    f"{name} {n:,}" for name, n in reasons[source.title].most_common()
                )
                problems.append(f"{source.title}: {bad:,} of {read:,} records ({found})")
        if problems:
            shutil.copyfile(self.path, self.report)
            raise DataError(
                f"more than {self.max_share:.2%} of the records are bad in {'; '.join(problems)}: "
                f"see {self.report}, then mend them or raise --max-rejects"
            )
