"""Data sets by name: downloaded once from the hub, or a mirror of it, and kept in a cache.

Hugging Face's variables apply: HF_ENDPOINT is a mirror, HF_HOME the folder of the cache, HF_TOKEN
opens private sets, and HF_HUB_OFFLINE=1 asks for the cache alone.
"""

import functools
import logging
from typing import Any

from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0


def load_hub_dataset(source: Source) -> Any:
    """Load a data set by name; `datasets` downloads it once and memory-maps it.

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
        reason = (str(error) or type(error).__name__).split("\n")[0]
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
