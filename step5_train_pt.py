"""Step 5: continue pretraining, with LoRA on the transformer and both embeddings in full.

Reads   <artifacts>/step3_model/, <artifacts>/step4_data/
Writes  <artifacts>/step5_pt/  the merged model, its tokenizer, adapter/, history.json, loss.png
Run     python step5_train_pt.py                      one GPU or the CPU; breakpoints work
        bash step5_train_pt_multi_gpu.sh              all GPUs, DeepSpeed ZeRO-2
"""

from chatglm_ja.cli import run  # first: it makes Ctrl-C during the other imports quiet

# isort: split
import constants
from chatglm_ja.settings import parse
from chatglm_ja.training.settings import TrainingConfig
from chatglm_ja.training.step import run_training_step


def main() -> None:
    config = parse(TrainingConfig, __doc__, constants.STEP5, profile=constants.PROFILE_LINE)
    # A model that this step trained can be trained further.
    run_training_step(config, __file__, "pretrain", ("step3_resize_model.py", "step5_train_pt.py"))


if __name__ == "__main__":
    run(main)
