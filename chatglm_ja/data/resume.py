"""Step 4's work in progress: folders that a later run resumes from, and the file of bad records.

    step4_data.work/                beside the output folder, removed when that is published
      texts-3f0c.../                tokenized chunks of a source of texts, see token_store.py
      conversations-91ab.../        tokenized chunks of a source of conversations
      shards-77de.../               Arrow files, rejects.jsonl, the report

A folder's name is a hash of the settings and inputs that shape its content. A run that follows a
kill, or has other settings, therefore finds the parts that are still valid. Finished files are
linked into the output folder: a kill during publication loses nothing.
"""

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chatglm_ja.data.document_index import DocumentIndex
from chatglm_ja.data.readers import Reject
from chatglm_ja.data.rejects import RejectCount, check_rejects
from chatglm_ja.data.settings import PrepareDataConfig
from chatglm_ja.data.token_store import FORMAT
from chatglm_ja.errors import DataError
from chatglm_ja.storage.files import link_or_copy, rename_or_remove
from chatglm_ja.storage.inputs import Input

log = logging.getLogger(__name__)

OUTDATED = "outdated-"


def content_keys(
    config: PrepareDataConfig, inputs: Sequence[Input]
) -> dict[str, list[dict[str, Any]]]:
    """Return all that shapes the tokens of each source: of texts, and of conversations.

    That is the source's files and declaration, the tokenizer, and settings of step 4.
    """
    by_role = {item.role: item for item in inputs}
    tokenizer = by_role["step2_merge_tokenizer"].fingerprint
    evaluation = by_role.get("evaluation_texts")
    texts = {
        "min_characters": config.min_characters,
        "check_language": config.check_language,
        "signatures": config.near_duplicates > 0,
    }
    conversations = {
        "max_length": config.max_length,
        "long_conversations": config.long_conversations,
    }
    keys: dict[str, list[dict[str, Any]]] = {"texts": [], "conversations": []}
    for role, sources, settings in (
        ("texts", config.sources, texts),
        ("conversations", config.sft_sources, conversations),
    ):
        for source, files in zip(sources, by_role[role].source_fingerprints, strict=True):
            changed, declaration = source.modification_times(), source.settings()
            own: dict[str, Any] = {"files": files, "changed": changed, "source": declaration}
            own["unicode_form"] = config.unicode_form
            own["decontaminate"] = [source.settings() for source in config.decontaminate]
            own["evaluation_texts"] = evaluation and evaluation.fingerprint
            keys[role].append({**own, "tokenizer": tokenizer, **settings})
    return keys


@contextmanager
def open_folders(
    root: Path, **contents: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, list[Path]]]:
    """Yield a folder below `root` for each content of each name; remove all other folders.

    Files that a killed run left half-written are removed, too. If an exception passes through, the
    folders stay for the next run, and a log line says so.
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
    current = {path for group in folders.values() for path in group}
    if root.exists():
        for path in root.iterdir():
            if path not in current:
                # Rename before deleting, so that a crash leaves nothing that looks resumable.
                outdated = path.with_name(OUTDATED + path.name.removeprefix(OUTDATED))
                rename_or_remove(path, outdated)
                shutil.rmtree(outdated, ignore_errors=True)
        for part in root.rglob("*.part"):
            part.unlink()
    for path in current:
        path.mkdir(parents=True, exist_ok=True)
    try:
        yield folders
    except BaseException:
        log.info("finished work is kept in %s: re-run the command to resume", root)
        raise


def link_files(source: Path, target: Path) -> None:
    """Put the files of a folder into another one on the same disk.

    Shards, which never change, are hard-linked if the file system can. Other files are copied: a
    later run overwrites them in place, which must not alter what is published.
    """
    for path in source.iterdir():
        put = link_or_copy if path.suffix == ".arrow" else shutil.copyfile
        put(path, target / path.name)


class RejectsFile:
    """Step 4's file of all bad records, and the limit on their share.

    path        the file, to be published with the result
    report      a copy of it that stays if the limit is exceeded and nothing is published
    max_share   largest share of a source's records that may be bad
    """

    def __init__(self, path: Path, report: Path, max_share: float) -> None:
        self.path, self.report, self.max_share = path, report, max_share
        path.write_bytes(b"")
        report.unlink(missing_ok=True)

    def check(self, index: DocumentIndex) -> None:
        """Append the bad records of an index to the file; see `check_rejects`."""
        counts = [
            RejectCount(source, index.records_read(number))
            for number, source in enumerate(index.sources)
        ]
        # A column's name may hold a lone surrogate, which has no UTF-8 form.
        with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            for number, row in index.rejects():
                reject = Reject(row["reason"], row["detail"])
                counts[number].add(row["file"], row["line"], reject)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        try:
            check_rejects(counts, self.max_share, str(self.report))
        except DataError:
            shutil.copyfile(self.path, self.report)
            raise
