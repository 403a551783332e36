"""Step 6: fine-tune on conversations; the loss counts the assistant's tokens only.

Reads   <artifacts>/step5_pt/, or with --model step3_model/; <artifacts>/step4_data/
Writes  <artifacts>/step6_sft/  the merged model, its tokenizer, adapter/, history.json, loss.png,
                                sources.json
Prints  answers to validation questions
Run     python step6_train_sft.py                     one GPU or the CPU; breakpoints work
        bash step6_train_sft_multi_gpu.sh             all GPUs, DeepSpeed ZeRO-2
"""

from chatglm_ja.cli import run  # first: it makes Ctrl-C during the other imports quiet

# isort: split
import constants
from chatglm_ja.settings import parse
from chatglm_ja.training.settings import SftConfig
from chatglm_ja.training.step import run_training_step


def main() -> None:
    config = parse(SftConfig, __doc__, constants.STEP6, profile=constants.PROFILE_LINE)
    if run_training_step(config, __file__, "sft", ("step5_train_pt.py", "step3_resize_model.py")):
        from chatglm_ja.evaluation import answers

        answers.print_samples(config)


if __name__ == "__main__":
    run(main)
