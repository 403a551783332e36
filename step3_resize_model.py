"""Step 3: give the checkpoint embedding rows for the new pieces, as a model of transformers.

ChatGLM3 becomes a GlmForCausalLM; other bases keep their class. The base's rows do not change by a
bit, which every run verifies.

Reads   <base model>/, <artifacts>/step2_tokenizer/
Writes  <artifacts>/step3_model/  weights, config.json, generation_config.json, tokenizer
Run     python step3_resize_model.py
"""

from chatglm_ja.cli import run  # first: it makes Ctrl-C during the other imports quiet

# isort: split
import logging
from pathlib import Path

import constants
from chatglm_ja.bases.families import open_base_model
from chatglm_ja.settings import parse
from chatglm_ja.storage.inputs import open_artifact
from chatglm_ja.storage.output import Output
from chatglm_ja.vocabulary.settings import ResizeModelConfig

log = logging.getLogger(__name__)


def main() -> None:
    config = parse(ResizeModelConfig, __doc__, constants.STEP3, profile=constants.PROFILE_LINE)
    inputs = [
        *open_base_model(config.base_model, config.tokenizer),
        open_artifact(config.tokenizer, "step2_merge_tokenizer.py", every_byte=config.verify),
    ]
    output = Output(config, Path(__file__).stem, inputs)
    if config.check:
        from chatglm_ja.vocabulary import embedding_rows

        embedding_rows.open_base(config)
    if not output.prepare():
        return

    from chatglm_ja.vocabulary import embedding_rows

    base = embedding_rows.open_base(config)
    compares_logits = config.should_compare_logits(base.weights.size())
    with output.write() as folder:
        output.counts, output.records = embedding_rows.resize_checkpoint(base, config, folder)
        if compares_logits:
            embedding_rows.verify_logits(base, folder)
            log.info("logits over the %d old ids equal the base's bit by bit", base.first_new_id)
    log.info(
        "%(old_rows)d rows -> %(new_rows)d: %(kept)d kept, %(initialised)d initialized, "
        "%(padding)d padding",
        output.counts,
    )
    log.info("resized model: %s", config.output_dir)


if __name__ == "__main__":
    run(main)
