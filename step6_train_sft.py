"""Step 6: fine-tune on conversations; the loss counts the assistant's tokens only.

Reads   <artifacts>/step5_pt/, <artifacts>/step4_data/
Writes  <artifacts>/step6_sft/  the merged model, its tokenizer, adapter/, history.json,
                                sources.json
Prints  answers to validation questions
Run     python step6_train_sft.py                     one GPU or the CPU; breakpoints work
        bash step6_train_sft_multi_gpu.sh             all GPUs, DeepSpeed ZeRO-2
"""

from pathlib import Path

import constants
from chatglm_ja.cli import run
from chatglm_ja.settings import parse
from chatglm_ja.storage.inputs import open_artifact
from chatglm_ja.storage.output import Output
from chatglm_ja.training.settings import SftConfig


def main() -> None:
    config = parse(SftConfig, __doc__, constants.STEP6)
    if config.estimate is not None:
        from chatglm_ja.training import costs

        print(costs.describe_costs(config))
        return
    data = open_artifact(config.data, "step4_prepare_data.py", every_byte=config.verify)
    config.check_rows(data.read_number("arguments", "max_length"))
    inputs = [open_artifact(config.model, "step5_train_pt.py", every_byte=config.verify), data]
    output = Output(config, Path(__file__).stem, inputs, unfinished="checkpoints")
    if not output.prepare():
        return

    from chatglm_ja.evaluation import validation_answers
    from chatglm_ja.training import train

    train.train_and_publish(config, output, "sft")
    validation_answers.print_samples(config)


if __name__ == "__main__":
    run(main)
