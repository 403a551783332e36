"""Step 5: continue pretraining, LoRA on the transformer and both embeddings in full, together.

Reads   <artifacts>/step3_model/, <artifacts>/step4_data/
Writes  <artifacts>/step5_pt/  the merged model, its tokenizer, adapter/, history.json
Run     python step5_train_pt.py                      one GPU or the CPU; breakpoints work
        bash step5_train_pt_multi_gpu.sh              all GPUs, DeepSpeed ZeRO-2
"""

from pathlib import Path

import constants
from chatglm_ja.cli import run
from chatglm_ja.settings import parse
from chatglm_ja.storage.inputs import open_artifact
from chatglm_ja.storage.output import Output
from chatglm_ja.training.settings import TrainingConfig


def main() -> None:
    config = parse(TrainingConfig, __doc__, constants.STEP5)
    if config.estimate is not None:
        from chatglm_ja.training import costs

        print(costs.describe_costs(config))
        return
    data = open_artifact(config.data, "step4_prepare_data.py", every_byte=config.verify)
    config.check_rows(data.read_number("arguments", "block_size"))
    inputs = [
        # What this step made before can be trained further.
        open_artifact(
            config.model, "step3_resize_model.py", "step5_train_pt.py", every_byte=config.verify
        ),
        data,
    ]
    output = Output(config, Path(__file__).stem, inputs, unfinished="checkpoints")
    if not output.prepare():
        return

    from chatglm_ja.training import train

    train.train_and_publish(config, output, "pretrain")


if __name__ == "__main__":
    run(main)
