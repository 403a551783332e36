"""Step 4's work in progress: folders that a later run goes on with, and the file of bad records.

    step4_data.work/                beside the output folder, removed when that is published
      texts-3f0c.../                units of a source of texts, see units.py
      conversations-91ab.../        units of a source of conversations
      shards-77de.../               Arrow files, rejects.jsonl, the report

A folder is named by all that shapes its content, so that a run that was killed, or one with
other settings, finds what is still good. Finished files are linked into the output folder: a kill
while that is being published loses nothing.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from chatglm_ja.data.index import Index
from chatglm_ja.data.readers import LOST_FILE
from chatglm_ja.data.units import FORMAT
from chatglm_ja.errors import DataError

log = logging.getLogger(__name__)

OUTDATED = "outdated-"


@contextmanager
def open_folders(
    root: Path, **contents: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, list[Path]]]:
    """Folders below `root` for each name and each of its contents; other ones are removed.

    An exception leaves them to the next run, and says so.
    """
    folders: dict[str, list[Path]] = {}
    seen: Counter[Path] = Counter()
    for name, group in contents.items():
        folders[name] = []
        for content in group:
            text = json.dumps([FORMAT, content], sort_keys=True, default=str)
            path = root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
            seen[path] += 1
            # A source that is listed twice has two folders.
            folders[name].append(path if seen[path] == 1 else Path(f"{path}-{seen[path]}"))
    wanted = {path for group in folders.values() for path in group}
    if root.exists():
        for path in root.iterdir():
            if path not in wanted:
                _remove(path)
    for path in wanted:
        path.mkdir(parents=True, exist_ok=True)
    try:
        yield folders
    except BaseException:
        for part in root.rglob("*.part"):
            part.unlink()
        log.info("what is finished is kept in %s for the next run", root)
        raise


def _remove(folder: Path) -> None:
    """Remove a folder that nobody must take for whole while it is being removed."""
    if not folder.name.startswith(OUTDATED):
        folder = folder.rename(folder.with_name(OUTDATED + folder.name))
    shutil.rmtree(folder)


def link_files(source: Path, target: Path) -> None:
    """Put the files of a folder into another on the same disk.

    The large ones, which are written once and renamed, without a copy where it can; reports are
    written in place, which must not reach what is published.
    """
    for path in source.iterdir():
        if path.suffix == ".arrow":
            with suppress(PermissionError):  # of a file system without hard links
                os.link(path, target / path.name)
                continue
        shutil.copyfile(path, target / path.name)


class RejectsFile:
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
        """Write those of an index; DataError when a source has more than it may, or no record."""
        reasons: list[Counter[str]] = [Counter() for _ in index.sources]
        # A column's name can hold what has no UTF-8 form.
        with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            for number, reject in index.rejects():
                reasons[number][reject["reason"]] += 1
                file.write(json.dumps(reject, ensure_ascii=False) + "\n")
                if reject["reason"] in LOST_FILE:
                    title, name = reject["source"], reject["file"]
                    log.warning("%s: %s, %s: %s", title, name, reject["reason"], reject["detail"])
        problems = []
        for number, source in enumerate(index.sources):
            bad, read = index.counts(number)["rejected"], index.records_read(number)
            if not read:
                condition = f" where {'='.join(source.where)}" if source.where else ""
                raise DataError(f"source {source.title} ({source}) holds no record{condition}")
            if bad > self.max_share * read:
                found = ", ".join(f"{name} {n:,}" for name, n in reasons[number].most_common())
                problems.append(f"{source.title}: {bad:,} of {read:,} records ({found})")
        if problems:
            shutil.copyfile(self.path, self.report)
            cure = "mend them or raise --max-rejects"
            if any("duplicate id" in found for found in reasons):
                cure += "; ids that are none: id_column: null for the source in a YAML file"
            raise DataError(
                f"more than {self.max_share:.2%} of the records are bad in {'; '.join(problems)}: "
                f"see {self.report}, then {cure}"
            )
