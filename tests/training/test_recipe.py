"""The recipe: optimizer groups, learning rates, and one clipped update, computed independently."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import GlmForCausalLM

from chatglm_ja.training import train
from chatglm_ja.training.settings import TrainingConfig
from chatglm_ja.training.trainer import ResumableTrainer
from tests.training.runs import config_for

LORA_RATE, EMBEDDING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-2, 3e-3, 0.4, 0.05
STEPS, WARMUP = 10, 3
DECAY = 0.4  # of the steps
UPDATED_STEP = 2  # the first step has a learning rate of 0


@dataclasses.dataclass(repr=False)  # pytest would print all tensors
class Recorded:
    """What a run did: at each step the parameter groups, inputs, and weights before it."""

    groups: list[list[dict[str, Any]]] = dataclasses.field(default_factory=list)
    names: list[list[str]] = dataclasses.field(default_factory=list)
    inputs: list[list[dict[str, torch.Tensor]]] = dataclasses.field(default_factory=list)
    weights: list[dict[str, torch.Tensor]] = dataclasses.field(default_factory=list)
    moments: list[dict[str, dict[str, torch.Tensor]]] = dataclasses.field(default_factory=list)


@pytest.fixture(scope="module")
def recorded(
    resized_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Recorded:
    """A run of ten steps, each of two micro-batches."""
    run = Recorded()
    compute_loss, clip = ResumableTrainer.compute_loss, ResumableTrainer._get_grad_norm

    def record_inputs(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len(run.inputs) == self.state.global_step:
            run.inputs.append([])
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            run.weights.append({n: p.detach().clone() for n, p in trained.items()})
            state = self.optimizer.optimizer.state
            run.moments.append(
                {n: {k: v.clone() for k, v in state[p].items()} for n, p in trained.items()}
            )
        run.inputs[-1].append({name: value.clone() for name, value in inputs.items()})
        return compute_loss(self, model, inputs, *args, **kwargs)

    def record_groups(self: Any, model: Any, grad_norm: Any = None) -> Any:
        groups = self.optimizer.param_groups
        run.groups.append([{k: v for k, v in group.items() if k != "params"} for group in groups])
        by_parameter = {parameter: name for name, parameter in model.named_parameters()}
        run.names = [[by_parameter[p] for p in group["params"]] for group in groups]
        return clip(self, model, grad_norm)

    folder = tmp_path_factory.mktemp("recipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResumableTrainer, "compute_loss", record_inputs)
        patch.setattr(ResumableTrainer, "_get_grad_norm", record_groups)
        config = config_for(
            resized_dir, data_dir, folder, learning_rate=LORA_RATE, evaluations=0,
            embedding_learning_rate=EMBEDDING_RATE, weight_decay=WEIGHT_DECAY, max_steps=STEPS,
            warmup_ratio=WARMUP / STEPS, decay_ratio=DECAY,
            max_grad_norm=MAX_GRAD_NORM, micro_batch_size=4,
        )  # fmt: skip
        train.train(config, "pretrain", None)
    return run


def test_lora_and_embeddings_are_two_groups(recorded: Recorded) -> None:
    lora, embeddings = recorded.names
    assert len(lora) == 3 * 6 * 2 and all(".lora_A." in n or ".lora_B." in n for n in lora)
    assert embeddings == [
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.weight",
    ]
    for groups in recorded.groups:
        assert [group["weight_decay"] for group in groups] == [WEIGHT_DECAY, 0.0]
        assert [group["betas"] for group in groups] == [(0.9, 0.95)] * 2


def test_learning_rates_warm_up_stay_and_decay(recorded: Recorded) -> None:
    assert len(recorded.groups) == STEPS
    decay = round(DECAY * STEPS)
    assert decay > 1
    for step, groups in enumerate(recorded.groups):
        factor = min(1.0, step / WARMUP)
        if step > STEPS - decay:
            factor = 0.5 * (1 + math.cos(math.pi * (step - STEPS + decay) / decay))
        expected = [LORA_RATE * factor, EMBEDDING_RATE * factor]
        assert [group["lr"] for group in groups] == pytest.approx(expected, rel=1e-9)


def test_an_update_is_that_of_plain_pytorch(recorded: Recorded, resized_dir: Path) -> None:
    """Two steps of AdamW on transformers' own model with PEFT's LoRA, gradients clipped."""
    base = GlmForCausalLM.from_pretrained(resized_dir, dtype=torch.float32)
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(TrainingConfig)}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
    rank, alpha = defaults["lora_rank"], defaults["lora_alpha"]
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    model.train()
    lora, embeddings = ([model.get_parameter(n) for n in group] for group in recorded.names)
    with torch.no_grad():
        for name, value in recorded.weights[0].items():
            model.get_parameter(name).copy_(value)  # LoRA's matrices start at random
    for parameter in embeddings:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(
        [{"params": lora, "weight_decay": WEIGHT_DECAY}, {"params": embeddings, "weight_decay": 0}],
        betas=(0.9, 0.95),
    )
    for step in range(UPDATED_STEP):
        batches = [dict(batch) for batch in recorded.inputs[step]]
        assert len(batches) == 2
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        trained = 0
        for batch in batches:
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits
            losses.append(F.cross_entropy(logits[:, :-1].mT, labels, reduction="sum"))
            trained += int((labels != -100).sum())
        (torch.stack(losses).sum() / trained).backward()
        norm = torch.nn.utils.clip_grad_norm_([*lora, *embeddings], MAX_GRAD_NORM)
        assert norm > 5 * MAX_GRAD_NORM
        for group, peak in zip(optimizer.param_groups, (LORA_RATE, EMBEDDING_RATE), strict=True):
            group["lr"] = peak * step / WARMUP
        optimizer.step()
    for name, expected in recorded.weights[UPDATED_STEP].items():
        parameter = model.get_parameter(name)
        # The moments show the clipping, to which Adam's update is almost invariant.
        for key in ("exp_avg", "exp_avg_sq"):
            moment, actual = (
                optimizer.state[parameter][key],
                recorded.moments[UPDATED_STEP][name][key],
            )
            assert (moment - actual).norm() < 1e-4 * moment.norm() + 1e-20, (name, key)
        # Adam divides by gradients: where they are almost zero, it amplifies rounding.
        scale = optimizer.state[parameter]["exp_avg_sq"].sqrt()
        is_large = scale >= 1e-2 * scale.max()
        update = (parameter - recorded.weights[0][name])[is_large]
        assert (parameter - expected)[is_large].norm() <= 1e-4 * update.norm(), name
