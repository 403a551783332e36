"""Data sets by name: downloaded once from the hub, or a mirror of it, and kept in its cache.

The files of the split are read as those of a local folder are. What is not read so, a CSV file or
a part of a split (`train[:1%]`), is loaded by `datasets`, which keeps a second copy in Arrow's
format.

Hugging Face's variables apply: HF_ENDPOINT is a mirror, HF_HOME the folder of the cache, HF_TOKEN
opens private sets, and HF_HUB_OFFLINE=1 asks for the cache alone.
"""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from chatglm_ja.errors import DataError, first_line
from chatglm_ja.source_files import list_folder
from chatglm_ja.sources import Source
from chatglm_ja.storage import disk
from chatglm_ja.storage.files import read_json, write_json

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
CARD = "README.md"
SLICE_MARKS = frozenset("[+")  # of a split that is a part of one, or several together


class Listing(BaseModel):
    """The files of a version of a data set, with their sizes in bytes.

    It is kept beside the hub's cache, so that a cache that lacks some of them is recognized without
    the hub.
    """

    name: str  # as the hub has it now; `Source.path` may be an older one
    commit: str
    sizes: dict[str, int]


def download_files(source: Source) -> Sequence[Path]:
    """Return the files of a data set's split, downloaded unless the cache holds them.

    Returns none if they are to be loaded by `datasets`, which also explains what is wrong with the
    name. Raises DataError if a download fails, and ArtifactError if the disk of the cache lacks
    space.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    listing = _list_files(source.path, source.revision)
    if listing is None or SLICE_MARKS & {*source.split}:
        return ()
    cache = Path(constants.HF_HUB_CACHE)
    repository = repo_folder_name(repo_id=listing.name, repo_type="dataset")
    folder = cache / repository / "snapshots" / listing.commit
    is_answering = _go_offline_if_silent()
    if is_answering and CARD in listing.sizes and not (folder / CARD).exists():
        _fetch(source, listing, CARD)
    try:
        found = list_folder(folder, source.split, source.subset, listing.sizes).files
    except DataError:
        return ()
    missing = [path.relative_to(folder).as_posix() for path in found if not path.exists()]
    if missing and not is_answering:
        return ()
    if missing:
        size = sum(listing.sizes[name] for name in missing)
        disk.require_free(cache, size, "set HF_HOME to a folder on another disk")
        # Not every mirror says how large its files are.
        log.info("%s: downloading%s", source.title, f" {disk.format_bytes(size)}" if size else "")
        for name in missing:
            _fetch(source, listing, name)
    return found


def _fetch(source: Source, listing: Listing, name: str) -> None:
    """Download a file of a data set into the cache."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(listing.name, name, repo_type="dataset", revision=listing.commit)
    except Exception as error:  # the hub's errors have no common base
        if isinstance(error, OSError) and error.errno:  # a full disk, no permission
            raise
        raise DataError(
            f"source {source.title}: {name} of {listing.name} could not be downloaded "
            f"({first_line(error)}): re-run the command to go on; if the data set has terms, "
            "accept them on its page and set HF_TOKEN"
        ) from None


@functools.cache
def _list_files(name: str, revision: str | None) -> Listing | None:
    """Return the files of a data set, as the hub or an earlier run has listed them.

    Returns None if neither knows them.
    """
    import huggingface_hub
    from huggingface_hub import constants

    kept = Path(constants.HF_HOME, "chatglm_ja", f"{name}@{revision or 'main'}.json")
    try:
        if not _go_offline_if_silent():
            return Listing.model_validate(read_json(kept))
        info = huggingface_hub.HfApi().dataset_info(name, revision=revision, files_metadata=True)
    except Exception:  # the hub's errors have no common base; `datasets` will say what is wrong
        return None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    listing = Listing(name=info.id, commit=info.sha or "", sizes=sizes)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, listing.model_dump())
    return listing


def download(source: Source) -> None:
    """Download a data set, and raise what reading it would: DataError, or ArtifactError."""
    if not download_files(source):
        load_hub_dataset(source)


def load_hub_dataset(source: Source) -> Any:
    """Load a data set by name with `datasets`, which downloads it once and memory-maps it.

    If the hub does not answer, a set in the cache is used. Raises DataError if there is none, if
    the set does not exist or is private, and for an unknown split or configuration.
    """
    import datasets

    is_answering = _go_offline_if_silent()
    try:
        return datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision
        )
    except ValueError as error:  # an unknown split or configuration; lists those that exist
        reason = " ".join(str(error).split())
        raise DataError(
            f"source {source.title}: the data set {source.path} does not have the split "
            f"{source.split!r} or the configuration asked for ({reason}): choose a configuration "
            "with @NAME, a split with split=NAME"
        ) from None
    except Exception as error:  # the hub's errors have no common base
        reason = first_line(error)
        if not is_answering:
            reason = "the hub does not answer, and the cache does not hold it"
        raise DataError(
            f"source {source.title}: {source.path} is neither a local file nor a data set that "
            f"could be loaded ({reason}): check its name, set HF_TOKEN if it is private, or "
            "download it and pass its path as LANGUAGE=PATH"
        ) from None


@functools.cache
def _go_offline_if_silent() -> bool:
    """Return whether the hub answers; if not, use the cache alone for the rest of the process.

    The hub's client would try again for half a minute for each set.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
    except Exception as error:  # those of whichever HTTP library the client uses
        log.warning(
            "the hub %s does not answer (%s): using what is in the cache, %s",
            constants.ENDPOINT, error, constants.HF_HOME,
        )  # fmt: skip
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return False
    return True
