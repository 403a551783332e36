"""Step 2: merge the Japanese pieces into the base's tokenizer.

Old ids do not change, those of special tokens included; new pieces follow. Every run checks the
guarantee of the policy on held-out texts and publishes nothing if it is broken.

Reads   <artifacts>/step1_tokenizer/, the tokenizer and config.json of <base model>/
Writes  <artifacts>/step2_tokenizer/  tokenizer.json, tokenizer_config.json, tokenizer.model for
        ChatGLM3 or chat_template.jinja for others, merge_report.json, merge_report.html
Run     python step2_merge_tokenizer.py
        python step2_merge_tokenizer.py --max-new-pieces 0     without new pieces
"""

from chatglm_ja.cli import run  # first: it makes Ctrl-C during the other imports quiet

# isort: split
import dataclasses
import functools
import logging
from pathlib import Path

import constants
from chatglm_ja.bases.families import load_tokenizer, open_base, open_base_tokenizer
from chatglm_ja.data import corpus
from chatglm_ja.settings import parse
from chatglm_ja.storage.inputs import open_artifact_or_file, open_sources
from chatglm_ja.storage.output import Output
from chatglm_ja.vocabulary.settings import MergeTokenizerConfig

log = logging.getLogger(__name__)


def main() -> None:
    config = parse(MergeTokenizerConfig, __doc__, constants.STEP2, profile=constants.PROFILE_LINE)
    ranking = config.ranking_sources if config.max_new_pieces else ()
    inputs = [
        open_base_tokenizer(config.base_model),
        open_sources("check_texts", config.check_sources),
    ]
    adds_pieces = config.max_new_pieces != 0
    if adds_pieces:
        step1 = "step1_train_tokenizer.py"
        inputs.append(open_artifact_or_file(config.ja_tokenizer, step1, config.verify))
    policy = config.choose_policy(inputs[-1].manifest if adds_pieces else None)
    if ranking:
        inputs.append(open_sources("ranking_texts", ranking))
    output = Output(dataclasses.replace(config, policy=policy), Path(__file__).stem, inputs)
    if not output.prepare():
        return

    from tqdm.auto import tqdm

    from chatglm_ja.data.source_reader import SourceReader
    from chatglm_ja.reports import merge_report
    from chatglm_ja.vocabulary import merging

    base = open_base(config.base_model)
    learned = base.vocabulary.read_learned(config.ja_tokenizer) if adds_pieces else []
    reader = SourceReader(config)
    ranking_texts = corpus.take_characters(reader.texts_in_turn(ranking), config.ranking_characters)
    reader.check()
    merged = merging.merge_pieces(
        base.vocabulary,
        learned,
        policy,
        max_new_pieces=config.max_new_pieces,
        ranking_texts=ranking_texts,
    )
    log.info("%s", merge_report.describe_merge(merged))
    if adds_pieces:
        merging.check_added(merged, policy, is_chosen=config.policy is not None)

    with output.write() as folder:
        merged.vocabulary.save(folder)
        before, after = base.tokenizer, load_tokenizer(folder)
        compare = functools.partial(
            merging.compare_segmentation,
            before,
            after,
            policy=policy,
            content_of=base.vocabulary.content_of_text,
            rust=merged.vocabulary.make_line_encoder(),
        )
        languages = {
            language: compare(tqdm(texts, desc=f"comparing {language}"))
            for language, texts in reader.texts_by_language(config.check_sources).items()
        }
        merging.check_guarantee(languages, policy)
        merging.check_special_tokens(compare(base.vocabulary.special_tokens))
        report = merge_report.build_report(policy, merged, languages, before, after)
        merge_report.write_report(folder, report, base.describe().name)
        output.counts.update(merged.counts())
    for line in merge_report.describe_languages(report):
        log.info("%s", line)
    log.info("merged tokenizer: %s", config.output_dir)


if __name__ == "__main__":
    run(main)
