"""Step 2: merge the Japanese pieces into ChatGLM3's tokenizer.

All old ids stay as they are, the 9 special tokens in their places included; new pieces follow.

Reads   <artifacts>/step1_tokenizer/, <base model>/tokenizer.model and config.json
Writes  <artifacts>/step2_tokenizer/  tokenizer.model, tokenizer.json, tokenizer_config.json,
        merge_report.json
Run     python step2_merge_tokenizer.py
"""

import json
import logging
from pathlib import Path

import constants
from chatglm_ja import corpus
from chatglm_ja.artifacts import Output, open_artifact, open_base_model, open_file_input
from chatglm_ja.cli import run
from chatglm_ja.config import MergeTokenizerConfig, Source, parse
from chatglm_ja.errors import DataError

log = logging.getLogger(__name__)


def main() -> None:
    config = parse(MergeTokenizerConfig, __doc__, constants.STEP2)
    sources = [Source.parse(spec) for spec in config.check_sources]
    inputs = [
        open_base_model(config.base_model)[0],
        open_file_input("check_texts", *corpus.local_paths(sources)),
        open_artifact(config.ja_tokenizer, "step1_train_tokenizer.py"),
    ]
    output = Output(config.output_dir, Path(__file__).stem, config.arguments(), inputs)
    if output.is_settled(config.overwrite, config.check):
        return

    from chatglm_ja import checkpoint, tokenizer

    base = tokenizer.read_model(config.base_model / tokenizer.MODEL_FILE)
    base_config = checkpoint.read_config(config.base_model)
    tokenizer.check_base(base, base_config["padded_vocab_size"], config.base_model)
    japanese = tokenizer.read_model(config.ja_tokenizer / tokenizer.JA_MODEL_FILE)
    merged = tokenizer.merge(base, japanese, config.policy)
    before = tokenizer.processor(tokenizer.with_special_tokens(base))
    after = tokenizer.processor(merged.proto)
    comparison = {}
    for language, texts in corpus.texts_by_language(sources).items():
        result = comparison[language] = tokenizer.compare(before, after, texts, config.policy)
        if not result.lines:
            raise DataError(f"--check-sources hold no {language} text to compare on")
        if result.broken:
            raise DataError(
                f"{len(result.broken)} {language} lines that the policy {config.policy} must leave "
                f"as they are would change, first {result.broken[0]!r}: nothing was written"
            )

    with output.write() as folder:
        tokenizer.save(merged.proto, folder)
        report = {
            "policy": config.policy,
            "pieces": merged.counts(),
            "unspellable": merged.unspellable,
            "unreachable": merged.unreachable,
            "comparison": {label: result.row() for label, result in comparison.items()},
        }
        text = json.dumps(report, indent=2, ensure_ascii=False)
        (folder / "merge_report.json").write_text(text + "\n", encoding="utf-8")
        output.counts.update(merged.counts())
    log.info("pieces: %s", ", ".join(f"{name} {n:,}" for name, n in merged.counts().items()))
    for label, result in comparison.items():
        row = result.row()
        log.info(
            "%s: %.2f%% of %d lines segmented as before, tokens per character %.3f -> %.3f",
            label,
            100 * row["identical_share"],
            row["lines"],
            row["tokens_per_char_before"],
            row["tokens_per_char_after"],
        )
    log.info("merged tokenizer: %s", config.output_dir)


if __name__ == "__main__":
    run(main)
