"""The filters that look at one text alone, in the order in which they decide."""

from collections.abc import Sequence

import numpy as np

from chatglm_ja.data import language_id, quality
from chatglm_ja.data.cleaning import Fate
from chatglm_ja.sources import Source


def apply_filters(
    texts: Sequence[str],
    codes: np.ndarray,
    source: Source,
    min_characters: int,
    check_language: bool = True,
) -> list[Fate]:
    """Return the filter that drops each cleaned text of a source, or Fate.KEPT.

    `codes` are the texts' code points.
    """
    language = source.language
    # The last filter comes first, so that the earlier ones decide.
    fates = [Fate.KEPT] * len(texts)
    if source.quality:
        fates = quality.judge(texts, codes, language)
    if check_language and language in language_id.LANGUAGES:
        fits = language_id.fits_language(texts, codes, language)
        fates = [fate if ok else Fate.LANGUAGE for fate, ok in zip(fates, fits, strict=True)]
    for place, text in enumerate(texts):
        if len(text) < min_characters:
            fates[place] = Fate.SHORT if text else Fate.EMPTY
    return fates
