"""Settings of step 4."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chatglm_ja.errors import ConfigError
from chatglm_ja.settings import CORES, REPORTS_BYTES, StepConfig, setting
from chatglm_ja.source_files import COMPRESSIONS
from chatglm_ja.sources import Source, source_contradictions

UNICODE_FORM = "NFC"
MAX_REJECTS = 0.01
TOKEN_BYTES = 4
COMPRESSION_RATIO = 4  # of compressed texts and parquet files, about
TEXT_BYTES_PER_TOKEN = 3  # at least
SIGNATURE_BYTES = 600  # per document, for the near-duplicate search
DOCUMENT_BYTES = 2000  # mean size of a document


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(StepConfig):
    """How a step reads texts and conversations; the same in all steps, from constants.py."""

    unicode_form: Literal["NFC", "NFKC", "none"] = setting(
        "Unicode normalization of texts; the tokenizer has none, and NFKC would remove the "
        "full-width forms from Japanese",
        UNICODE_FORM,
    )
    max_rejects: float = setting(
        "stop if a larger share of a source's records is bad", MAX_REJECTS, low=0, high=1,
        affects_result=False,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PrepareDataConfig(ReadingConfig):
    """Settings of step 4, which prepares pretraining blocks and fine-tuning examples."""

    tokenizer: Path = setting("output folder of step 2")
    sources: tuple[Source, ...] = setting(
        "pretraining texts: a YAML file of sources, or each as "
        "LANGUAGE=PATH_OR_DATASET[@SUBSET][?COLUMN=VALUE][#COLUMN][,FIELD=VALUE], where FIELD is "
        "split, revision, format, weight, quality or another field of a source; each line of a "
        ".txt file is a text, or with format=paragraphs a paragraph, with format=document all of "
        "it; with quality=web, junk pages of a crawl are dropped (no value: no texts)",
        (),
    )
    shares: tuple[str, ...] = setting("each language's share of the tokens, LANGUAGE=SHARE", ())
    total_tokens: int = setting("tokens of pretraining blocks to make (0: no texts)", low=0)
    max_repeats: float = setting(
        "epochs over a source's texts that may be used to fill its share; up to 4 cost little "
        "(arXiv 2305.16264)",
        4.0,
        low=1.0,
        high=1000,
    )
    block_size: int = setting("tokens in a pretraining block", 1024, low=8, high=2**20)
    packing: Literal["concat", "best_fit"] = setting(
        "concat: documents continue from block to block, and every block is full; best_fit: only "
        "documents longer than a block, and the last of a share, are cut",
        "concat",
    )
    validation_tokens: int = setting(
        "held-out tokens for validation, over all languages", 2_000_000, low=0
    )
    min_characters: int = setting("drop texts of fewer characters", 32, low=1)
    check_language: bool = setting(
        "drop texts with less prose in their language (ja, zh, en) than in others", True
    )
    near_duplicates: float = setting(
        "drop texts with this Jaccard similarity to an earlier one, estimated with MinHash from "
        "the 5-grams of their letters and digits (0: keep them)",
        0.8,
        low=0,
        high=1,
    )
    decontaminate: tuple[Source, ...] = setting(
        "evaluation texts; of pretraining texts, cut out what shares 13 tokens in a row with them, "
        "and drop such conversations",
        (),
    )
    sft_sources: tuple[Source, ...] = setting(
        "conversations: a YAML file of sources, or each as "
        "KIND=PATH_OR_DATASET[@SUBSET][?COLUMN=VALUE][#COLUMNS][,FIELD=VALUE], where COLUMNS is a "
        "column of messages or QUESTION[+QUESTION]>ANSWER columns (no value: no conversations)",
        (),
    )
    sft_shares: tuple[str, ...] = setting("each kind's share of the conversations, KIND=SHARE", ())
    sft_examples: int = setting("conversations to train on (0: none)", low=0)
    sft_validation_examples: int = setting("held-out conversations for validation", 1000, low=0)
    max_length: int = setting(
        "tokens of the longest conversation, and of a bin of conversations",
        1024,
        low=16,
        high=2**20,
    )
    long_conversations: Literal["cut", "drop"] = setting(
        "what to do with longer ones: cut their oldest exchanges, or drop them", "cut"
    )
    seed: int = setting("seed for sampling and ordering texts and conversations", 0, low=0)
    num_processes: int = setting(
        "processes that read and tokenize; of a Ray cluster (RAY_ADDRESS), all CPUs do",
        CORES,
        low=1,
        affects_result=False,
    )

    def __post_init__(self) -> None:
        """Leave out the sources of texts, or of conversations, if none are to be made."""
        for size, *group in (
            ("total_tokens", "sources", "shares", "validation_tokens"),
            ("sft_examples", "sft_sources", "sft_shares", "sft_validation_examples"),
        ):
            if not getattr(self, size) or not getattr(self, group[0]):
                for name in (size, *group):
                    empty: Any = () if isinstance(getattr(self, name), tuple) else 0
                    object.__setattr__(self, name, empty)
        super().__post_init__()

    def contradictions(self) -> list[str]:
        problems = []
        if not self.sources and not self.sft_sources:
            problems.append(
                "there is nothing to prepare: expected --sources and --total-tokens for texts, or "
                "--sft-sources and --sft-examples for conversations"
            )
        for sources, shares, name in (
            (self.sources, self.shares, "--shares"),
            (self.sft_sources, self.sft_shares, "--sft-shares"),
        ):
            languages = {source.language for source in sources}
            named = set(parse_shares(shares))
            if languages != named:
                cure = " ".join(f"{language}=SHARE" for language in sorted(languages))
                problems.append(
                    f"{name} names {', '.join(sorted(named)) or 'nothing'}, but the sources are "
                    f"{', '.join(sorted(languages))}: pass {name} {cure}"
                )
        problems += source_contradictions(self.sources)
        problems += source_contradictions(self.sft_sources)
        problems += [
            f"{source.title}: the format wikitext is for pretraining texts"
            for source in self.sft_sources
            if source.format == "wikitext"
        ]
        problems += [
            f"{source.title}: quality {source.quality} is for pretraining texts"
            for source in self.sft_sources
            if source.quality
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
        path.stat().st_size
        * (COMPRESSION_RATIO if path.suffix in (*COMPRESSIONS, ".parquet") else 1)
        for source in sources
        for path in source.files()
    )


def parse_shares(specs: Sequence[str]) -> dict[str, float]:
    """Parse shares such as ("ja=76", "zh=12", "en=12") into fractions that add up to 1."""
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
    total = sum(shares.values())
    return {label: share / total for label, share in shares.items()}
