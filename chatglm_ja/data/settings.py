"""Settings of step 4."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatglm_ja.errors import ConfigError
from chatglm_ja.settings import CORES, REPORTS_BYTES, StepConfig, setting
from chatglm_ja.sources import Source, source_contradictions

TOKEN_BYTES = 4
COMPRESSION = 4  # compressed texts are about a quarter of their size
TEXT_BYTES_PER_TOKEN = 3  # at least
SIGNATURE_BYTES = 600  # of a document, for the near-duplicate search
DOCUMENT_BYTES = 2000  # a document's mean size


@dataclass(frozen=True, kw_only=True)
class PrepareDataConfig(StepConfig):
    """Step 4."""

    tokenizer: Path = setting("output folder of step 2")
    sources: tuple[Source, ...] = setting(
        "pretraining texts: a YAML file of sources, or each as "
        "LANGUAGE=PATH_OR_DATASET[@SUBSET][?COLUMN=VALUE][#COLUMN]"
    )
    shares: tuple[str, ...] = setting("share of the tokens, LANGUAGE=SHARE", ())
    total_tokens: int = setting("tokens of pretraining blocks to make", low=1)
    max_repeats: float = setting(
        "how often a source's texts may be repeated to fill its share; up to 4 times cost little "
        "(arXiv 2305.16264)",
        4.0,
        low=1.0,
        high=1000,
    )
    block_size: int = setting("tokens in a pretraining block", 1024, low=8, high=2**20)
    packing: Literal["concat", "best_fit"] = setting(
        "concat: documents run on from block to block, every block is full; best_fit: only "
        "documents longer than a block are cut, and where a share ends",
        "concat",
    )
    validation_tokens: int = setting(
        "tokens kept from training for validation, over all languages", 2_000_000, low=0
    )
    unicode_form: Literal["NFC", "NFKC", "none"] = setting(
        "Unicode normalisation of texts; the tokenizer has none, and NFKC would take the "
        "full-width forms from Japanese",
        "NFC",
    )
    min_characters: int = setting("drop texts that are shorter", 32, low=1)
    check_language: bool = setting(
        "drop texts that are not written in the script of their language (ja, zh, en)", True
    )
    near_duplicates: float = setting(
        "drop texts this similar to an earlier one: Jaccard similarity of their 5-grams of "
        "characters, estimated with MinHash (0: keep them)",
        0.8,
        low=0,
        high=1,
    )
    decontaminate: tuple[Source, ...] = setting(
        "evaluation texts: pretraining texts that share 13 tokens in a row with them are dropped",
        (),
    )
    sft_sources: tuple[Source, ...] = setting(
        "conversations: a YAML file of sources, or each as "
        "KIND=PATH_OR_DATASET[@SUBSET][?COLUMN=VALUE][#COLUMNS], where COLUMNS is a column of "
        "messages or QUESTION[+QUESTION]>ANSWER columns"
    )
    sft_shares: tuple[str, ...] = setting("share of the conversations, KIND=SHARE", ())
    sft_examples: int = setting("conversations to take", low=1)
    sft_validation_examples: int = setting("conversations kept for validation", 1000, low=0)
    max_length: int = setting(
        "tokens of the longest conversation, and of an SFT bin", 1024, low=16, high=2**20
    )
    long_conversations: Literal["cut", "drop"] = setting(
        "what to do with longer ones: leave out their oldest exchanges, or drop them", "cut"
    )
    max_rejects: float = setting(
        "share of a source's records that may be bad before this stops", 0.01, low=0, high=1,
        affects_result=False,
    )  # fmt: skip
    seed: int = setting("seed of the draw and order of texts and conversations", 0, low=0)
    num_processes: int = setting(
        "processes that read and tokenise: all cores", CORES, low=1, affects_result=False
    )

    def contradictions(self) -> list[str]:
        problems = []
        for sources, shares, name in (
            (self.sources, self.shares, "--shares"),
            (self.sft_sources, self.sft_shares, "--sft-shares"),
        ):
            languages = {source.language for source in sources}
            named = set(parse_shares(shares))
            if languages != named:
                problems.append(
                    f"{name} names {', '.join(sorted(named)) or 'nothing'}, but the sources are "
                    f"{', '.join(sorted(languages))}"
                )
        problems += source_contradictions(self.sources)
        problems += source_contradictions(self.sft_sources)
        problems += [
            f"{source.title}: the format wikitext is for pretraining texts"
            for source in self.sft_sources
            if source.format == "wikitext"
        ]
        weighted = [source.title for source in self.sft_sources if source.weight is not None]
        if weighted:
            problems.append(
                f"{', '.join(weighted)}: a weight is for pretraining texts; conversations are "
                "drawn to --sft-shares"
            )
        return problems

    def disk_bytes(self) -> int:
        """Estimate the size of the packed rows and of all tokenized texts and conversations."""
        texts = max(_text_bytes(self.sources), TEXT_BYTES_PER_TOKEN * self.total_tokens)
        conversations = _text_bytes(self.sft_sources)
        work = (texts + 2 * conversations) // TEXT_BYTES_PER_TOKEN * TOKEN_BYTES
        if self.near_duplicates:
            work += texts // DOCUMENT_BYTES * SIGNATURE_BYTES
        bins = self.sft_examples * self.max_length // 2
        rows = (self.total_tokens + self.validation_tokens + 2 * bins) * TOKEN_BYTES
        return REPORTS_BYTES + work + rows


def _text_bytes(sources: Sequence[Source]) -> int:
    """Estimate the bytes of text in local sources; data sets on the hub count as nothing."""
    return sum(
        path.stat().st_size * (COMPRESSION if path.suffix in (".gz", ".parquet") else 1)
        for source in sources
        for path in source.files()
    )


def parse_shares(specs: Sequence[str]) -> dict[str, float]:
    """`("ja=76", "zh=12", "en=12")` as fractions that add up to 1."""
    shares: dict[str, float] = {}
    for spec in specs:
        label, _, number = spec.partition("=")
        try:
            share = float(number)
        except ValueError:
            raise ConfigError(f"share {spec!r} is not of the form LABEL=NUMBER") from None
        if label in shares or not 0 < share < 1e9:
            raise ConfigError(f"share {spec!r} must be one positive number for each label")
        shares[label] = share
    if not shares:
        raise ConfigError("no shares are given: expected LABEL=NUMBER")
    total = sum(shares.values())
    return {label: share / total for label, share in shares.items()}
