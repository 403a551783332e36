"""Training in one process: what is trained, logged, saved and merged, and how a run stops."""

import functools
import json
import math
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets.arrow_writer import ArrowWriter
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, GlmForCausalLM

from chatglm_ja.bases import families
from chatglm_ja.chatglm3 import tensor_names, tokenizer
from chatglm_ja.chatglm3.weights import BaseWeights, load_base
from chatglm_ja.data import dataset
from chatglm_ja.errors import ConfigError, DataError, StoppedError
from chatglm_ja.messages import IGNORE_INDEX
from chatglm_ja.storage import weights as stored_weights
from chatglm_ja.training import progress, stopping, train, trainer
from chatglm_ja.training.adapter import (
    ADAPTER,
    PEFT_PREFIX,
    choose_dtype,
    load_for_training,
    trained_embeddings,
    verify_logits,
    write_merged,
)
from chatglm_ja.training.model import Collator
from chatglm_ja.training.settings import SftConfig
from chatglm_ja.training.trainer import ResumableTrainer
from tests.conftest import write_manifest
from tests.training.runs import (
    adapter,
    checkpoints_in,
    config_for,
    interrupted_after,
    with_losses,
)


@pytest.fixture(scope="module")
def trained(resized_dir: Path, data_dir: Path, tmp_path_factory: Any) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("trained")
    config = config_for(resized_dir, data_dir, folder)
    result = train.train(config, "pretrain", folder)
    write_merged(resized_dir, folder)
    return folder, result


def test_the_loss_falls_and_is_logged(trained: tuple[Path, dict]) -> None:
    _, result = trained
    losses = [entry["loss"] for entry in result["history"] if "loss" in entry]
    assert len(losses) == result["steps"] == 6
    assert losses[-1] < losses[0] - 0.2
    evaluated = [entry for entry in result["history"] if "eval_ja_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [0, 2, 4, 6]
    assert evaluated[0]["eval_ja_bits_per_char"] > evaluated[-1]["eval_ja_bits_per_char"] > 0


def test_lora_and_both_embeddings_learn_and_nothing_else(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    config = config_for(resized_dir, data_dir, tmp_path)
    model = load_for_training(config, torch.bfloat16)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    embeddings = {PEFT_PREFIX + name for name in trained_embeddings(model.get_base_model())}
    assert len(embeddings) == 2
    assert all("lora_" in name for name in trained - embeddings)
    # Six projections in each of three layers, two matrices each.
    assert len(trained - embeddings) == 6 * 3 * 2
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    # One copy of each embedding matrix: PEFT's modules_to_save would keep a second.
    rows = model.config.vocab_size
    assert sum(p.shape[0] == rows for p in model.parameters()) == 2
    frozen = load_for_training(
        config_for(resized_dir, data_dir, tmp_path, train_embeddings=False),
        torch.float32,
    )  # fmt: skip
    assert all("lora_" in n for n, p in frozen.named_parameters() if p.requires_grad)


def test_the_embeddings_have_their_own_learning_rate(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    config = config_for(resized_dir, data_dir, tmp_path, embedding_learning_rate=0.0, max_steps=2)
    train.train(config, "pretrain", tmp_path)
    write_merged(resized_dir, tmp_path)
    for name in (tensor_names.GLM_EMBEDDING, tensor_names.GLM_LM_HEAD):
        before = AutoModelForCausalLM.from_pretrained(resized_dir).get_parameter(name)
        after = AutoModelForCausalLM.from_pretrained(tmp_path).get_parameter(name)
        assert torch.equal(before, after)


def test_the_merged_model_is_base_plus_adapter(
    trained: tuple[Path, dict], resized_dir: Path
) -> None:
    folder, _ = trained
    ids = torch.randint(300, 4000, (2, 30))
    base = GlmForCausalLM.from_pretrained(resized_dir, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folder / ADAPTER)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = adapted(ids).logits
        difference = (expected - merged(ids).logits).abs().max() / expected.abs().max()
    # The merged weights are stored as the base's are, in float16.
    assert difference < 2e-3
    lora = load_file(folder / ADAPTER / "adapter_model.safetensors")
    for target in ("self_attn.q_proj", "mlp.gate_up_proj"):
        name = f"model.layers.1.{target}"
        down, up = (lora[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        # alpha / rank is 2 by default.
        weight = stored_weights.read_tensor(resized_dir, f"{name}.weight").double() + 2 * up @ down
        found = merged.get_parameter(f"{name}.weight").double()
        assert torch.allclose(found, weight, rtol=1e-3, atol=1e-5)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float16
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["GlmForCausalLM"]


def test_only_the_chosen_matrices_get_lora(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """The adapter holds these, and merging changes only these."""
    config = config_for(
        resized_dir, data_dir, tmp_path, lora_targets=("down_proj", "v_proj"), evaluations=0,
        train_embeddings=False, max_steps=2,
    )  # fmt: skip
    train.train(config, "pretrain", tmp_path)
    settings = json.loads((tmp_path / ADAPTER / "adapter_config.json").read_text())
    assert sorted(settings["target_modules"]) == ["down_proj", "v_proj"]
    write_merged(resized_dir, tmp_path)
    before = dict(stored_weights.iterate_tensors(resized_dir))
    after = dict(stored_weights.iterate_tensors(tmp_path))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    ends = ("v_proj.weight", "down_proj.weight")
    assert changed == {name for name in before if name.endswith(ends)}
    assert verify_logits(resized_dir, tmp_path) < 1e-2


def test_all_embedding_rows_are_in_the_adapter(
    trained: tuple[Path, dict], resized_dir: Path
) -> None:
    folder, _ = trained
    before = AutoModelForCausalLM.from_pretrained(resized_dir)
    after = AutoModelForCausalLM.from_pretrained(folder)
    for name in (tensor_names.GLM_EMBEDDING, tensor_names.GLM_LM_HEAD):
        assert not torch.equal(before.get_parameter(name), after.get_parameter(name))
        assert before.get_parameter(name).shape == after.get_parameter(name).shape


def test_sft_trains_on_bins(resized_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    config = config_for(
        resized_dir, data_dir, tmp_path, global_batch_size=2, block_size=256, max_steps=3
    )
    result = train.train(config, "sft", tmp_path)
    losses = [entry["loss"] for entry in result["history"] if "loss" in entry]
    assert losses[-1] < losses[0]


def test_conversations_are_scored_by_kind_and_by_source(
    resized_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    copy_of: Any,
) -> None:  # fmt: skip
    """Compared with the plain model, one conversation at a time; by source before and after."""
    data = copy_of(data_dir, tmp_path / "data")
    write_manifest(data, {"sft": {"sources": [{"name": "ja/help"}]}})
    config = config_for(
        resized_dir, data, tmp_path / "out", block_size=256, global_batch_size=1, max_steps=3,
        evaluations=3,
    )  # fmt: skip
    history = train.train(config, "sft", None)["history"]
    model = GlmForCausalLM.from_pretrained(resized_dir, dtype=torch.float32)
    nats = tokens = 0.0
    for row in dataset.unpack_rows(dataset.load_rows(data, "sft", "validation")):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.inference_mode():
            scores = model(ids).logits[0, :-1].log_softmax(-1)
        at = (labels != IGNORE_INDEX).nonzero()[:, 0]
        nats -= scores[at, labels[at]].sum().item()
        tokens += len(at)
    scored = [entry for entry in history if "validation_loss" in entry]
    assert [entry["step"] for entry in scored] == [0, 1, 2, 3]
    assert scored[0]["eval_ja_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert scored[0]["validation_loss"] == scored[0]["eval_ja_loss"]
    assert [entry.get("source_ja/help_tokens") for entry in scored] == [tokens, None, None, tokens]
    said = capsys.readouterr().err
    before, after = (scored[i]["source_ja/help_loss"] for i in (0, 3))
    rows = dataset.load_rows(data, "sft", "train")
    counted = f"{sum(map(len, rows['lengths'])):,}", f"{sum(map(sum, rows['lengths'])):,}"
    table = [line.split() for line in said.splitlines() if line.startswith("ja/help")]
    assert table[0] == ["ja/help", "ja", *counted, f"{before:.4f}"]
    assert table[1] == [*table[0], f"{after:.4f}"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_bad_conversation_is_refused_before_the_model_is_loaded(
    resized_dir: Path, data_dir: Path, tmp_path: Path, copy_of: Any, split: str
) -> None:
    data = copy_of(data_dir, tmp_path / "data")
    rows = dataset.load_rows(data_dir, "sft", split)[:]
    rows["labels"][-1] = [IGNORE_INDEX] * len(rows["labels"][-1])
    (path,) = data.glob(f"sft_{split}-*.arrow")
    path.unlink()
    features = dataset.load_rows(data_dir, "sft", split).features
    with ArrowWriter(path=str(path), features=features) as writer:
        for row in zip(*rows.values(), strict=True):
            writer.write(dict(zip(rows, row, strict=True)))
        writer.finalize()
    config = config_for(tmp_path, data, tmp_path / "out", block_size=256, global_batch_size=1)
    for name in ("config.json", "tokenizer.model"):
        shutil.copyfile(resized_dir / name, tmp_path / name)
    with pytest.raises(DataError, match=f"{split} conversation .* has no token that is trained"):
        train.train(config, "sft", None)


def test_a_rising_validation_loss_gives_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    history: list[dict[str, float]] = []
    for loss in (3.0, 2.0, 2.1, 2.0, 2.2):
        history.append({trainer.ALL_LOSS: loss})
        trainer.warn_of_rise(history)
    assert not caplog.records
    history.append({trainer.ALL_LOSS: 2.3})
    trainer.warn_of_rise(history)
    assert "the validation loss rises: 2.0000, 2.2000, 2.3000" in caplog.text


def test_packed_conversations_train_as_padded_ones(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """The same conversations in a step give the same losses and the same weights; the gradients
    themselves are compared in tests/training/test_model.py."""
    bins = dataset.load_rows(data_dir, "sft", "train")
    conversations = sum(map(len, bins["lengths"]))
    assert conversations > 2 * len(bins)
    losses, weights = [], []
    for packing, rows in ((True, len(bins)), (False, conversations)):
        folder = tmp_path / str(packing)
        config = config_for(
            resized_dir, data_dir, folder, packing=packing, global_batch_size=rows, block_size=256,
            micro_batch_size=rows, max_steps=3, epochs=3.0, evaluations=0,
        )  # fmt: skip
        history = train.train(config, "sft", folder)["history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
        weights.append(load_file(folder / ADAPTER / "adapter_model.safetensors"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, packed in weights[0].items():
        # Adam divides by gradients that can be all but zero.
        assert (packed - weights[1][name]).norm() < 1e-2 * packed.norm(), name


def test_bits_per_character_are_those_of_the_text(
    trained: tuple[Path, dict], resized_dir: Path, data_dir: Path
) -> None:
    """Compared with the plain model, one document at a time, from full logits."""
    model = GlmForCausalLM.from_pretrained(resized_dir, dtype=torch.float32)
    encoder = tokenizer.load_processor(resized_dir)
    nats = characters = 0.0
    for row in dataset.load_rows(data_dir, "pretrain", "validation"):
        start = 0
        for length in row["lengths"] if row["language"] == "zh" else []:
            ids = torch.tensor(row["input_ids"][start : start + length])
            start += length
            with torch.inference_mode():
                scores = model(ids[None]).logits[0, :-1].log_softmax(-1)
            nats -= scores[torch.arange(length - 1), ids[1:]].sum().item()
        if row["language"] == "zh":
            characters += len(encoder.decode(row["input_ids"]))
    first = next(e for e in trained[1]["history"] if "eval_zh_bits_per_char" in e)
    assert first["step"] == 0
    expected = nats / math.log(2) / characters
    assert first["eval_zh_bits_per_char"] == pytest.approx(expected, rel=1e-5)


def test_validation_in_half_precision_is_exact(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """The mean of float64 losses of the hidden states that the model computes in bfloat16."""
    config = config_for(resized_dir, data_dir, tmp_path, precision="bf16", max_steps=1)
    history = train.train(config, "pretrain", None)["history"]
    rows = dataset.load_rows(data_dir, "pretrain", "validation")
    model: Any = load_for_training(config, torch.bfloat16).get_base_model().eval()
    hidden: list[torch.Tensor] = []
    model.model.norm.register_forward_hook(lambda _, __, output: hidden.append(output))
    nats, tokens = 0.0, 0
    for row in rows:
        batch = Collator(document_mask=True)([row])
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            model(**batch, reduction="none")
        labels = batch["labels"][0, 1:]
        scores = (hidden.pop()[0, :-1].double() @ model.lm_head.weight.double().T).log_softmax(-1)
        at = (labels != IGNORE_INDEX).nonzero()[:, 0]
        nats -= scores[at, labels[at]].sum().item()
        tokens += len(at)
    first = next(entry for entry in history if "validation_loss" in entry)
    assert first["validation_loss"] == pytest.approx(nats / tokens, rel=1e-5)


def test_accumulation_changes_nothing(resized_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    """Training losses are normalised by the tokens of the whole step, validation by all tokens."""
    histories = []
    for micro in (8, 2):
        config = config_for(
            resized_dir, data_dir, tmp_path, max_steps=4,
            micro_batch_size=micro,
        )  # fmt: skip
        result = train.train(config, "pretrain", None)
        names = ("loss", "eval_ja_loss", "eval_zh_loss", "eval_en_loss")
        histories.append([e[name] for e in result["history"] for name in names if name in e])
    assert len(histories[0]) > 8
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)


def test_an_epoch_has_the_same_steps_however_it_is_divided(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """125 rows are 15 steps of 8 rows; the rest is dropped."""
    losses = []
    for micro in (8, 4, 1):
        config = config_for(
            resized_dir, data_dir, tmp_path, max_steps=-1, evaluations=0, micro_batch_size=micro
        )
        result = train.train(config, "pretrain", None)
        assert result["steps"] == 15
        losses.append([entry["loss"] for entry in result["history"] if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


def test_the_speed_is_that_of_training_alone(
    resized_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that a micro-batch advances by 2 seconds, and scoring by 100."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    for module in (trainer, progress):
        monkeypatch.setattr(module, "time", clock)
    for name, seconds in (("training_step", 2.0), ("_score", 100.0)):

        def slow(self: Any, *given: Any, whole: Any = None, seconds: float = 0.0) -> Any:
            now[0] += seconds
            if not hasattr(self, "seen"):
                self.seen, self.peak_tflops, self.flops_per_token = True, 0.5, 1e9
            return whole(self, *given)

        whole = getattr(ResumableTrainer, name)
        patched = functools.partialmethod(slow, whole=whole, seconds=seconds)
        monkeypatch.setattr(ResumableTrainer, name, patched)
    config = config_for(resized_dir, data_dir, tmp_path, micro_batch_size=4, logging_steps=2)
    result = train.train(config, "pretrain", None)
    lines = [entry for entry in result["history"] if "loss" in entry]
    # Two micro-batches a step: 4 seconds for 8 rows of 64 tokens.
    assert [line["tokens_per_second"] for line in lines] == [128.0] * 3
    assert [line["mfu"] for line in lines] == [pytest.approx(128e9 / 0.5e12, abs=1e-4)] * 3
    assert [e["step"] for e in result["history"] if "eval_ja_loss" in e] == [0, 2, 4, 6]


def test_the_last_step_is_logged_however_few_there_are(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    config = config_for(resized_dir, data_dir, tmp_path, max_steps=3, logging_steps=10)
    history = train.train(config, "pretrain", tmp_path)["history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [3]
    assert [entry["tokens_per_second"] > 0 for entry in history if "loss" in entry] == [True]


def test_a_single_evaluation_is_after_the_last_step(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    config = config_for(resized_dir, data_dir, tmp_path, evaluations=1, max_steps=3)
    history = train.train(config, "pretrain", None)["history"]
    assert [entry["step"] for entry in history if "eval_ja_loss" in entry] == [0, 3]


def test_nan_in_the_first_step_stops_at_once(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    model = GlmForCausalLM.from_pretrained(resized_dir)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(broken)
    families.copy_tokenizer(resized_dir, broken)
    config = config_for(broken, data_dir, tmp_path, max_steps=50)
    with pytest.raises(DataError, match="the training loss is nan at step 1: lower"):
        train.train(config, "pretrain", None)


def without_speed(entry: dict[str, Any]) -> dict[str, Any]:
    """Drop from a log entry what differs between runs with the same weights."""
    measured = ("tokens_per_second", "memory_gb", "train_runtime", "train_samples_per_second",
                "train_steps_per_second", "train_loss", "total_flos")  # fmt: skip
    return {name: value for name, value in entry.items() if name not in measured}


def test_an_interrupted_run_ends_as_an_undisturbed_one(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Weights, losses and log are bit-identical, with dropout."""
    folders = [tmp_path / "once", tmp_path / "twice"]
    results = []
    for folder in folders:
        config = config_for(
            resized_dir, data_dir, folder, max_steps=7, save_steps=3, logging_steps=2,
            micro_batch_size=1, global_batch_size=2, lora_dropout=0.1, epochs=5.0,
        )  # fmt: skip
        if folder == folders[1]:
            with interrupted_after(3):
                train.train(config, "pretrain", folder, checkpoints_in(folder))
        results.append(train.train(config, "pretrain", folder, checkpoints_in(folder)))
    assert adapter(folders[0]) == adapter(folders[1])
    for entries in zip(*(result["history"] for result in results), strict=True):
        assert without_speed(entries[0]) == without_speed(entries[1])


def test_replay_adds_blocks_and_resumes_to_the_bit(
    resized_dir: Path, data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rows = dataset.load_rows(data_dir, "sft", "train")
    folders = [tmp_path / name for name in ("without", "once", "twice")]
    for folder, replay in zip(folders, (0.0, 0.5, 0.5), strict=True):
        config = config_for(
            resized_dir, data_dir, folder, SftConfig, replay=replay, block_size=256, epochs=3,
            # Two steps an epoch: it is interrupted in the second one.
            global_batch_size=len(rows) * 3 // 4, micro_batch_size=8, save_steps=3,
        )  # fmt: skip
        if folder == folders[2]:
            with interrupted_after(3):
                train.train(config, "sft", folder, checkpoints_in(folder))
        result = train.train(config, "sft", folder, checkpoints_in(folder))
    assert result["steps"] == 6
    assert adapter(folders[0]) != adapter(folders[1]) == adapter(folders[2])
    count = round(len(rows) / 2)
    assert f"replaying {count} pretraining blocks among {len(rows)} rows an epoch" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(
    resized_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    whole = ResumableTrainer.training_step

    def signalled(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.state.global_step == 1:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)  # a launcher's copy of it
        return whole(self, *arguments, **named)

    before = signal.getsignal(number)
    config = config_for(resized_dir, data_dir, tmp_path)
    monkeypatch.setattr(ResumableTrainer, "training_step", signalled)
    with pytest.raises(
        StoppedError, match="at step 2 of 6: re-run the command to resume from step 2"
    ) as stopped:
        train.train(config, "pretrain", None, checkpoints_in(tmp_path))
    assert stopped.value.status == 143
    assert signal.getsignal(number) == before
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize(
    ("step", "batches"), [(0, 2), (2, 2), (6, 2), (2, 0), (6, 0)],
    ids=["first", "in between", "last", "due", "last due"],
)  # fmt: skip
def test_a_validation_is_left_to_the_resumed_run(
    resized_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int,
    batches: int,
) -> None:  # fmt: skip
    """A signal comes while the validation after `step` scores the second of twelve batches, or
    during the step itself. The resumed run ends as an undisturbed one."""
    scored: Counter[int] = Counter()
    whole = ResumableTrainer._prepare_inputs

    def prepare(self: Any, inputs: Any) -> Any:
        now = self.state.global_step
        if not self.model.training:
            scored[now] += 1
        if scored[step] == batches and now == (step if batches else step - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, inputs)

    def run(name: str) -> list[dict[str, Any]]:
        config = config_for(
            resized_dir, data_dir, tmp_path / name, evaluations=3, micro_batch_size=2,
            global_batch_size=2, logging_steps=4,
        )  # fmt: skip
        result = train.train(config, "pretrain", tmp_path / name, checkpoints_in(tmp_path / name))
        return [without_speed(entry) for entry in result["history"]]

    undisturbed = run("once")
    with monkeypatch.context() as patch:
        patch.setattr(ResumableTrainer, "_prepare_inputs", prepare)
        with pytest.raises(StoppedError, match=f"at step {step} of 6: "):
            run("twice")
    assert scored[step] == batches
    assert run("twice") == undisturbed
    assert adapter(tmp_path / "once") == adapter(tmp_path / "twice")


def test_a_second_signal_ends_the_run_at_once(
    resized_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ResumableTrainer.training_step

    def signalled(self: Any, *arguments: Any, **named: Any) -> Any:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return whole(self, *arguments, **named)

    monkeypatch.setattr(stopping, "SAME_SIGNAL_SECONDS", 0.0)
    monkeypatch.setattr(ResumableTrainer, "training_step", signalled)
    config = config_for(resized_dir, data_dir, tmp_path)
    # The caller of pytest may ignore SIGINT, as nohup does.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train.train(config, "pretrain", None, checkpoints_in(tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "checkpoints").exists()


def test_a_first_loss_of_zero_stops(
    resized_dir: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_losses(monkeypatch, step1=0.0)
    with pytest.raises(DataError, match="the loss of the first step is 0"):
        train.train(config_for(resized_dir, data_dir, tmp_path), "pretrain", None)


def test_a_batch_larger_than_the_data_is_refused(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    config = config_for(resized_dir, data_dir, tmp_path, global_batch_size=5000)
    with pytest.raises(DataError, match="125 rows, but a step takes 5000"):
        train.train(config, "pretrain", None)


def test_data_of_a_larger_vocabulary_is_refused(
    base_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    model = load_base(BaseWeights(base_dir), torch.float32)
    model.resize_token_embeddings(1000)
    model.save_pretrained(small)
    config = config_for(small, data_dir, tmp_path)
    with pytest.raises(DataError, match="the model has 1000 embedding rows"):
        train.train(config, "pretrain", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU")
def test_fp16_needs_a_gpu(resized_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    config = config_for(resized_dir, data_dir, tmp_path, precision="fp16")
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        choose_dtype(config)


def test_a_learning_rate_of_zero_leaves_the_transformer_as_it_is(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    config = config_for(resized_dir, data_dir, tmp_path, learning_rate=0.0, max_steps=2)
    train.train(config, "pretrain", tmp_path)
    write_merged(resized_dir, tmp_path)
    before = dict(stored_weights.iterate_tensors(resized_dir))
    after = dict(stored_weights.iterate_tensors(tmp_path))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {tensor_names.GLM_EMBEDDING, tensor_names.GLM_LM_HEAD}


def test_no_validation_rows_are_refused_unless_none_are_asked_for(
    resized_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = dataset.load_rows
    monkeypatch.setattr(
        dataset,
        "load_rows",
        lambda *names: read(*names).select(range(0 if names[2] == "validation" else 64)),
    )
    config = config_for(resized_dir, data_dir, tmp_path, max_steps=1)
    with pytest.raises(DataError, match="no validation rows of pretrain: prepare some, or pass"):
        train.train(config, "pretrain", None)
    config = config_for(resized_dir, data_dir, tmp_path, max_steps=1, evaluations=0)
    history = train.train(config, "pretrain", None)["history"]
    assert not any(name.startswith("eval_") for entry in history for name in entry)


def test_curves_are_written_for_tensorboard(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    stale = tmp_path / "out.tensorboard" / "stale"
    stale.mkdir(parents=True)
    config = config_for(resized_dir, data_dir, output, max_steps=2, tracker="tensorboard")
    history = train.train(config, "pretrain", output)["history"]
    assert not stale.exists()
    events = EventAccumulator(str(stale.parent)).Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(
        [entry["loss"] for entry in history if "loss" in entry]
    )
    assert {"eval/ja_bits_per_char", "train/tokens_per_second"} <= {*events.Tags()["scalars"]}


def test_compiled_layers_compute_the_same(
    resized_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers are traced and differentiated, but no code is generated, to save time."""
    traced = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    losses = []
    for compiled in (False, True):
        config = config_for(
            resized_dir, data_dir, tmp_path, compile=compiled, gradient_checkpointing="selective",
            max_steps=3, evaluations=0,
        )  # fmt: skip
        history = train.train(config, "pretrain", None)["history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
