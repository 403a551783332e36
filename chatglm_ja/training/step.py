"""What steps 5 and 6 do: open model and data, train, and publish the result."""

import json
from pathlib import Path

from chatglm_ja.errors import ArtifactError, ConfigError
from chatglm_ja.storage.inputs import Input, open_artifact
from chatglm_ja.storage.manifest import read_manifest
from chatglm_ja.storage.output import Output
from chatglm_ja.training.settings import TRAINED_PARTS, SftConfig, TrainingConfig

# The data sets in step 4's folder, and the setting of step 4 that limits the tokens in their rows.
ROW_SETTINGS = {"pretrain": "block_size", "sft": "max_length"}
# What step 4 has left out if a data set is missing, and how to make it.
MISSING_DATA = {
    "pretrain": (
        "texts",
        "with --sources and --total-tokens, or go on with step6_train_sft.py --replay 0, whose "
        "--model may be step 3's folder",
    ),
    "sft": ("conversations", "with --sft-sources and --sft-examples"),
}


def run_training_step(
    config: TrainingConfig, script: str, data_set: str, model_scripts: tuple[str, ...]
) -> bool:
    """Train on `data_set` for the step in the file `script`; return whether a model was trained.

    `model_scripts` are the steps whose output can be trained. Nothing is trained if the result
    exists already, and for --check and --estimate.
    """
    if config.estimate is not None:
        from chatglm_ja.training import costs

        print(costs.describe_costs(config, config.estimate))
        return False
    data = open_artifact(config.data, "step4_prepare_data.py", every_byte=config.verify)
    assert data.manifest is not None
    prepared_sets = data.manifest.counts
    if data_set not in prepared_sets:
        missing, cure = MISSING_DATA[data_set]
        raise ArtifactError(
            f"{config.data} was prepared without {missing}: run step4_prepare_data.py {cure}"
        )
    if isinstance(config, SftConfig) and config.replay and "pretrain" not in prepared_sets:
        raise ConfigError(
            f"--replay {config.replay} adds pretraining blocks, but {config.data} was prepared "
            "without texts: prepare some with step 4, or pass --replay 0"
        )
    prepared = data.read_number("arguments", ROW_SETTINGS[data_set])
    if prepared != config.block_size:
        raise ConfigError(
            f"{config.data} has rows of {prepared} tokens, but --block-size is "
            f"{config.block_size}: prepare the data with that size, or set it to the data's"
        )
    model = open_artifact(config.model, *model_scripts, every_byte=config.verify)
    inputs = [model, data]
    if config.continue_from is not None:
        inputs.append(open_run(config, config.continue_from, Path(script).stem, model))
    output = Output(config, Path(script).stem, inputs, unfinished="checkpoints")
    if not output.prepare():
        return False

    from chatglm_ja.training import train

    train.train_and_publish(config, output, data_set)
    return True


def open_run(config: TrainingConfig, folder: Path, step: str, model: Input) -> Input:
    """Return the run of `step` that published `folder`, as an input of one that continues it.

    Its data may be another. Raises ArtifactError or ConfigError if it did not train the same parts
    of `model`, or if it left no checkpoint from before its decay.
    """
    from chatglm_ja.training.checkpoints import open_before_decay

    manifest = read_manifest(folder)
    if manifest is None or manifest.step != step:
        raise ArtifactError(
            f"--continue-from {folder} is not a result of {step}.py: give the output folder of a "
            "finished run"
        )
    for name in TRAINED_PARTS:
        before, now = manifest.arguments.get(name), config.arguments()[name]
        if before != json.loads(json.dumps(now)):
            raise ConfigError(
                f"--continue-from {folder}: it was trained with {name}={before}, not {now}"
            )
    open_before_decay(folder, manifest.arguments | manifest.lineage, bool(config.verify))
    shared = {role: manifest.lineage.get(role, "") for role in model.lineage}
    role = "continued_run"
    return Input(role, manifest.fingerprint, {**shared, role: manifest.fingerprint})
