"""Settings of steps 1 to 3."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chatglm_ja.chatglm3 import base_config
from chatglm_ja.settings import CORES, REPORTS_BYTES, StepConfig, flag, setting
from chatglm_ja.sources import Source
from chatglm_ja.storage import disk
from chatglm_ja.storage.manifest import read_manifest

PIECE_BYTES = 60
MERGED_FORMS = 10  # size of a merged tokenizer's files, as a multiple of the two models merged

Policy = Literal["japanese", "kana", "han", "letters", "all"]

Init = Literal["subtoken_mean", "mean", "random"]

Layout = Literal["glm", "chatglm"]


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig(StepConfig):
    """Step 1. The settings from `normalization` on make the pieces fit the base's tokenizer."""

    sources: tuple[Source, ...] = setting(
        "texts of the new language: LANGUAGE=PATH_OR_DATASET[#COLUMN]"
    )
    method: Literal["sentencepiece", "continue"] = setting(
        "sentencepiece: learn from characters; continue: go on from the base's own merges, which "
        "gives shorter texts and no piece that the merge has to drop",
        "sentencepiece",
    )
    base_model: Path | None = setting(
        "ChatGLM3 folder, of which --method continue reads tokenizer.model and config.json", None
    )
    policy: Policy = setting("what --method continue may learn, as in step 2", "japanese")
    vocab_size: int = setting(
        "pieces to learn, control and byte pieces included", 20_000, low=300, high=1_000_000
    )
    character_coverage: float = setting(
        "share of the text's characters that get a piece; the rest stays bytes",
        0.9995,
        low=0.9,
        high=1.0,
    )
    input_sentence_size: int = setting(
        "train on at most this many lines, drawn at random (0: all)", 0, low=0
    )
    seed: int = setting("seed of that draw", 0, low=0)
    num_threads: int = setting("threads: all cores", CORES, low=1, affects_result=False)
    normalization: Literal["identity", "nfkc", "nmt_nfkc"] = setting(
        "the base does not normalise: pieces of normalised characters would never match raw text",
        "identity",
    )
    split_digits: bool = setting(
        "keep digits apart: the base does, and 1998 as one piece would change Chinese", True
    )
    byte_fallback: bool = setting(
        "spell characters without a piece in bytes, as the base does, instead of <unk>", True
    )
    keep_whitespace: bool = setting(
        "keep repeated and outer spaces: the base does, and text must decode to itself", True
    )
    dummy_prefix: bool = setting(
        "put a space before every line: the merged tokenizer does so only before a whole text, so "
        "that pieces learned with it at the start of a line would be lost on all other lines",
        False,
    )
    split_by_script: bool = setting(
        "never mix scripts in a piece: Japanese words do, as in 食べる", False
    )
    max_piece_length: int = setting(
        "characters of the longest piece; 16 as in the base, so that no piece is a whole sentence",
        16,
        low=1,
        high=512,
    )

    def contradictions(self) -> list[str]:
        problems = []
        if self.method == "sentencepiece" and self.policy != "japanese":
            problems.append("--policy is for --method continue; step 2 has one for all pieces")
        if self.method == "continue":
            if self.base_model is None:
                problems.append("--method continue needs --base-model: the ChatGLM3 folder")
            for name in ("normalization", "split_digits", "byte_fallback", "keep_whitespace",
                         "dummy_prefix", "split_by_script"):  # fmt: skip
                default = type(self).__dataclass_fields__[name].default
                if getattr(self, name) != default:
                    problems.append(f"{flag(name)} is for --method sentencepiece only")
        return problems

    def disk_bytes(self) -> int:
        """Estimate the size of the sentencepiece model and the list of its pieces."""
        return REPORTS_BYTES + PIECE_BYTES * self.vocab_size

    def trainer_settings(self) -> dict[str, Any]:
        """The settings that fit the pieces to the base, by sentencepiece's names."""
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
class MergeTokenizerConfig(StepConfig):
    """Step 2."""

    base_model: Path = setting("ChatGLM3 folder; tokenizer.model and config.json are read")
    ja_tokenizer: Path = setting("output folder of step 1, or any sentencepiece BPE model file")
    policy: Policy = setting(
        "which pieces are added: japanese: with kana or a kanji that Chinese does not use; "
        "kana: with kana; han: with any Han character or kana; letters: for other languages, with "
        "a letter or vowel sign that is neither Han nor one of a to z; all: every piece, "
        "unreachable ones too. japanese, kana and letters leave Chinese and English as they are, "
        "han English",
        "japanese",
    )
    max_new_pieces: int = setting(
        "add at most this many pieces: those used most on --ranking-sources (0: no limit)", 0, low=0
    )
    ranking_sources: tuple[Source, ...] = setting(
        "texts for --max-new-pieces: LANGUAGE=PATH_OR_DATASET[#COLUMN]", ()
    )
    ranking_characters: int = setting(
        "characters of them that are read, taken from every source in turn", 20_000_000, low=1
    )
    check_sources: tuple[Source, ...] = setting(
        "texts to compare the base and the merged tokenizer on: LANGUAGE=PATH[#COLUMN]"
    )

    def contradictions(self) -> list[str]:
        if self.max_new_pieces and not self.ranking_sources:
            return ["--max-new-pieces needs --ranking-sources: texts to count the uses on"]
        return []

    def disk_bytes(self) -> int:
        """Estimate the size of the merged tokenizer; tokenizer.json is its largest file."""
        models = [self.base_model / "tokenizer.model", self.ja_tokenizer]
        sizes = [
            m.stat().st_size if m.is_file() else disk.folder_bytes(m, "*.model") for m in models
        ]
        return REPORTS_BYTES + MERGED_FORMS * sum(sizes)

    def arguments(self) -> dict[str, Any]:
        """Without a limit of pieces, what they would be ranked on shapes nothing."""
        chosen = super().arguments()
        if not self.max_new_pieces:
            chosen = {k: v for k, v in chosen.items() if not k.startswith("ranking_")}
        return chosen


@dataclass(frozen=True, kw_only=True)
class ResizeModelConfig(StepConfig):
    """Step 3."""

    base_model: Path = setting(
        "ChatGLM3 folder: config.json, tokenizer.model, safetensors or .bin shards"
    )
    tokenizer: Path = setting("output folder of step 2")
    init: Init = setting(
        "new embedding rows: mean of the old rows of the piece's base tokens, mean of all old "
        "rows, or normal with the old rows' deviation",
        "subtoken_mean",
    )
    output_bias: float = setting(
        "how many times the mean of the base's padding rows is added to new output rows: more "
        "leaves more probability to the languages that the base knows",
        0.25,
        low=0,
        high=10,
    )
    layout: Layout = setting(
        "glm: transformers' own class, for steps 5 to 7; chatglm: the original names and files, "
        "for tools that know only those",
        "glm",
    )
    pad_to_multiple: int = setting("round the number of rows up to a multiple of this", 64, low=1)
    max_shard_gb: float = setting("size limit of an output file in GB", 2.0, low=0.001, high=1000)
    seed: int = setting("seed of --init random", 0, low=0)

    def disk_bytes(self) -> int:
        """Estimate the size of the weights with rows for the merged tokenizer's ids."""
        shape = base_config.read_shape(self.base_model)
        manifest = read_manifest(self.tokenizer)
        ids = manifest.counts.get("vocabulary", 0) if manifest else 0
        before = shape.layer_weights + shape.embedding_weights
        after = before + 2 * max(ids - shape.rows, 0) * shape.hidden
        return REPORTS_BYTES + disk.weights_bytes(self.base_model) * after // before
