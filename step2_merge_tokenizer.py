"""Step 2: merge the Japanese pieces into ChatGLM3's tokenizer.

Old ids do not change, the nine special tokens' included; new pieces follow. Every run checks the
guarantee of the policy on held-out texts and publishes nothing if it is broken.

Reads   <artifacts>/step1_tokenizer/, <base model>/tokenizer.model and config.json
Writes  <artifacts>/step2_tokenizer/  tokenizer.model, tokenizer.json, tokenizer_config.json,
        merge_report.json, merge_report.html
Run     python step2_merge_tokenizer.py
"""

from chatglm_ja.cli import run  # first: it makes Ctrl-C during the other imports quiet

# isort: split
import dataclasses
import logging
from pathlib import Path

import constants
from chatglm_ja.bases.families import open_base_tokenizer
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
        open_artifact_or_file(config.ja_tokenizer, "step1_train_tokenizer.py", config.verify),
    ]
    policy = config.choose_policy(inputs[-1].manifest)
    if ranking:
        inputs.append(open_sources("ranking_texts", ranking))
    output = Output(dataclasses.replace(config, policy=policy), Path(__file__).stem, inputs)
    if not output.prepare():
        return

    from tqdm.auto import tqdm

    from chatglm_ja.bases.chatglm3 import ChatGLM3Base
    from chatglm_ja.chatglm3.tokenizer import add_special_tokens, make_processor
    from chatglm_ja.chatglm3.tokenizer_files import make_line_encoder, save_tokenizer
    from chatglm_ja.data.source_reader import SourceReader
    from chatglm_ja.reports import merge_report
    from chatglm_ja.vocabulary import merging
    from chatglm_ja.vocabulary.learning import read_learned

    base = ChatGLM3Base.open(config.base_model)
    learned = read_learned(config.ja_tokenizer)
    reader = SourceReader(config)
    ranking_texts = corpus.take_characters(reader.texts_in_turn(ranking), config.ranking_characters)
    reader.check()
    merged = merging.merge_pieces(
        base.proto,
        learned,
        policy,
        max_new_pieces=config.max_new_pieces,
        ranking_texts=ranking_texts,
    )
    log.info("%s", merge_report.describe_merge(merged))
    merging.check_added(merged, policy, is_chosen=config.policy is not None)
    before = make_processor(add_special_tokens(base.proto))
    after = make_processor(merged.proto)
    rust = make_line_encoder(merged.proto)
    languages = {
        language: merging.compare_segmentation(
            before, after, tqdm(texts, desc=f"comparing {language}"), policy, rust
        )
        for language, texts in reader.texts_by_language(config.check_sources).items()
    }
    merging.check_guarantee(languages, policy)

    with output.write() as folder:
        save_tokenizer(merged.proto, folder)
        report = merge_report.build_report(policy, merged, languages, before, after)
        merge_report.write_report(folder, report)
        output.counts.update(merged.counts())
    for line in merge_report.describe_languages(report):
        log.info("%s", line)
    log.info("merged tokenizer: %s", config.output_dir)


if __name__ == "__main__":
    run(main)
