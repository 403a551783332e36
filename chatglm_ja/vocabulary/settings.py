"""Settings of steps 1 to 3."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chatglm_ja.bases.families import NO_BASE_MODEL, tokenizer_files
from chatglm_ja.bases.shape import read_shape
from chatglm_ja.chatglm3.base_config import MODEL_FILE
from chatglm_ja.data.settings import ReadingConfig
from chatglm_ja.errors import did_you_mean
from chatglm_ja.settings import CORES, REPORTS_BYTES, StepConfig, flag, setting
from chatglm_ja.sources import Source
from chatglm_ja.storage.disk import folder_bytes
from chatglm_ja.storage.manifest import Manifest, read_manifest
from chatglm_ja.storage.weight_files import weights_bytes
from chatglm_ja.vocabulary.initialization import Initialization
from chatglm_ja.vocabulary.languages import ISO_639_1, is_language_code
from chatglm_ja.vocabulary.policies import OTHER_LANGUAGE, Policy

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig(ReadingConfig):
    """Settings of step 1; from `normalization` on they make the pieces fit the base."""

    sources: tuple[Source, ...] = setting(
        "texts of the new language: LANGUAGE=PATH_OR_DATASET[#COLUMN]"
    )
    method: Literal["sentencepiece", "continue"] = setting(
        "sentencepiece: learn from characters; continue: continue the base's own merges, which "
        "gives fewer tokens per text and no piece that step 2 has to drop, and is the only method "
        "for a base with byte-level BPE (SmolLM2, Qwen, Llama 3)",
        "sentencepiece",
    )
    base_model: Path | None = setting(
        "folder of the base model; --method continue reads its tokenizer", None
    )
    policy: Policy = setting(
        f"which pieces step 2 is to add; --method continue learns no others: {Policy.explain()}",
        Policy.JAPANESE,
    )
    vocab_size: int = setting(
        "pieces to learn, control and byte pieces included; for a base with byte-level BPE, which "
        "has no such pieces, the merges to learn",
        20_000,
        low=1,
        high=1_000_000,
    )
    character_coverage: float = setting(
        "share of the text covered by characters with a piece; others are spelled in bytes",
        0.9995,
        low=0.9,
        high=1.0,
    )
    input_sentence_size: int = setting(
        "train on a random sample of at most this many lines (0: all)", 0, low=0
    )
    seed: int = setting("seed of the sample of lines", 0, low=0)
    num_threads: int = setting("number of threads", CORES, low=1, affects_result=False)
    normalization: Literal["identity", "nfkc", "nmt_nfkc"] = setting(
        "Unicode normalization of the text; identity as in the base, whose raw text would never "
        "match pieces of normalized characters",
        "identity",
    )
    split_digits: bool = setting(
        "split numbers into digits, as the base does; 1998 as one piece would change Chinese", True
    )
    byte_fallback: bool = setting(
        "spell characters without a piece in bytes instead of <unk>, as the base does", True
    )
    keep_whitespace: bool = setting(
        "keep repeated, leading and trailing spaces, as the base does, so that text decodes to "
        "itself",
        True,
    )
    dummy_prefix: bool = setting(
        "put a space before every line; the merged tokenizer does so only before a whole text, so "
        "pieces learned with that space would match no other line",
        False,
    )
    split_by_script: bool = setting(
        "never mix scripts in a piece; Japanese words do, as in 食べる", False
    )
    max_piece_length: int = setting(
        "maximum characters of a piece; 16 as in the base, so that no piece is a whole sentence",
        16,
        low=1,
        high=512,
    )

    def contradictions(self) -> list[str]:
        languages = dict.fromkeys(source.language for source in self.sources)
        problems = [*filter(None, (self._language_problem(name) for name in languages))]
        base = self.base_model
        has_bytes = base and base.is_dir() and not (base / MODEL_FILE).is_file()
        if self.method == "sentencepiece" and has_bytes:
            problems.append(
                f"--method sentencepiece is for a base with a {MODEL_FILE}, but {base} has none: "
                "pass --method continue"
            )
        if self.method == "continue":
            if self.base_model is None:
                problems.append(f"--method continue needs --base-model, and {NO_BASE_MODEL}")
            for name in ("normalization", "split_digits", "byte_fallback", "keep_whitespace",
                         "dummy_prefix", "split_by_script"):  # fmt: skip
                default = type(self).__dataclass_fields__[name].default
                if getattr(self, name) != default:
                    problems.append(f"{flag(name)} is for --method sentencepiece only")
        return problems

    def _language_problem(self, language: str) -> str | None:
        """Return what is wrong with the language of a source, whose pieces are to be learned."""
        if not is_language_code(language):
            hint = did_you_mean(language, ISO_639_1.split())
            return f"{language!r} is no language code of ISO 639, such as ja, ko or th{hint}"
        expected = self.policy.language or language
        if language == expected:
            return None
        return (
            f"the policy {self.policy} is for {expected}, but the language of a source is "
            f"{language}: correct it; {OTHER_LANGUAGE}"
        )

    def disk_bytes(self) -> int:
        """Estimate the size of the sentencepiece model and the list of its pieces."""
        return REPORTS_BYTES + 60 * self.vocab_size

    def trainer_settings(self) -> dict[str, Any]:
        """Return the settings that fit the pieces to the base, by sentencepiece's names."""
        return {
            "normalization_rule_name": self.normalization,
            "split_digits": self.split_digits,
            "byte_fallback": self.byte_fallback,
            "remove_extra_whitespaces": not self.keep_whitespace,
            "add_dummy_prefix": self.dummy_prefix,
            "split_by_unicode_script": self.split_by_script,
            "max_sentencepiece_length": self.max_piece_length,
        }


@dataclass(frozen=True, kw_only=True)
class MergeTokenizerConfig(ReadingConfig):
    """Settings of step 2."""

    base_model: Path = setting(
        "folder of the base model; its tokenizer and config.json are read", unset=NO_BASE_MODEL
    )
    ja_tokenizer: Path = setting(
        "output folder of step 1, or a file of pieces: for a base with sentencepiece any "
        "sentencepiece BPE model, for one with byte-level BPE merges in GPT-2's format"
    )
    policy: Policy | None = setting(
        f"which pieces to add; by default as in step 1: {Policy.explain()}", None
    )
    max_new_pieces: int | None = setting(
        "add at most this many pieces, those used most on --ranking-sources (default: no limit); "
        "0: none, for a base whose own vocabulary is good enough, and --ja-tokenizer is not read",
        None,
        low=0,
    )
    ranking_sources: tuple[Source, ...] = setting(
        "texts for --max-new-pieces: LANGUAGE=PATH_OR_DATASET[#COLUMN]", ()
    )
    ranking_characters: int = setting(
        "read at most this many characters of --ranking-sources, from each source in turn",
        20_000_000,
        low=1,
    )
    check_sources: tuple[Source, ...] = setting(
        "held-out texts to compare the base and the merged tokenizer on: LANGUAGE=PATH[#COLUMN]"
    )

    def contradictions(self) -> list[str]:
        if self.max_new_pieces and not self.ranking_sources:
            return ["--max-new-pieces needs --ranking-sources: texts to count the uses on"]
        return []

    def choose_policy(self, pieces: Manifest | None) -> Policy:
        """Return the policy of the command line, or else that of step 1; say so if they differ.

        `pieces` is the manifest of step 1's output, None for any other file.
        """
        recorded = pieces.arguments.get("policy") if pieces else None
        learned = next((policy for policy in Policy if policy == recorded), Policy.JAPANESE)
        if pieces and self.policy not in (None, learned):
            log.info("merging under the policy %s; step 1 learned under %s", self.policy, learned)
        return self.policy or learned

    def disk_bytes(self) -> int:
        """Estimate the merged tokenizer's files: ten times the models merged, or twice a base's
        tokenizer.json.
        """
        learned, files = self.ja_tokenizer, tokenizer_files(self.base_model)
        models = [path.stat().st_size for path in files if path.suffix == ".model"]
        others = [path.stat().st_size for path in files if path.suffix != ".model"]
        size = sum(folder_bytes(learned, pattern) for pattern in ("*.model", "*.txt"))
        size = learned.stat().st_size if learned.is_file() else size
        base = 10 * sum(models) if models else 2 * sum(others)
        return REPORTS_BYTES + base + 10 * size

    def arguments(self) -> dict[str, Any]:
        """Return the settings that shape the result; ranking texts do so only if they rank."""
        arguments = super().arguments()
        if not self.max_new_pieces:
            arguments = {k: v for k, v in arguments.items() if not k.startswith("ranking_")}
        return arguments


@dataclass(frozen=True, kw_only=True)
class ResizeModelConfig(StepConfig):
    """Settings of step 3."""

    base_model: Path = setting(
        "folder of the base model: config.json, its tokenizer, safetensors or .bin shards",
        unset=NO_BASE_MODEL,
    )
    tokenizer: Path = setting("output folder of step 2")
    init: Initialization = setting(
        f"how new embedding rows start: {Initialization.explain()}", Initialization.SUBTOKEN_MEAN
    )
    output_bias: float = setting(
        "multiple of the mean of the base's padding rows to add to new output rows; more leaves "
        "more probability to the languages that the base knows",
        0.25,
        low=0,
        high=10,
    )
    pad_to_multiple: int = setting("round the number of rows up to a multiple of this", 64, low=1)
    max_shard_gb: float = setting("maximum size of a shard in GB", 2.0, low=0.001, high=1000)
    seed: int = setting("seed of --init random", 0, low=0)

    def disk_bytes(self) -> int:
        """Estimate the size of the weights with rows for the merged tokenizer's ids."""
        shape = read_shape(self.base_model)
        manifest = read_manifest(self.tokenizer)
        ids = manifest.counts.get("vocabulary", 0) if manifest else 0
        added = shape.embeddings * max(ids - shape.rows, 0) * shape.hidden
        after = shape.weights + added
        return REPORTS_BYTES + weights_bytes(self.base_model) * after // shape.weights


def padded_rows(vocabulary: int, multiple: int) -> int:
    """Return the number of rows for `vocabulary` ids: the next multiple, which GPUs prefer."""
    return -(-vocabulary // multiple) * multiple
