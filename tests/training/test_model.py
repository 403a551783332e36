"""Packed documents against separate ones, in half precision too, and models with new rows.

With --embedding-rows new only the added rows are trained; the base's rows stay bit-identical.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GlmForCausalLM

from chatglm_ja.bases.loading import load_model
from chatglm_ja.bases.modules import find_embeddings
from chatglm_ja.bases.shape import read_shape
from chatglm_ja.chatglm3 import chat_format, tensor_names, tokenizer
from chatglm_ja.data import dataset
from chatglm_ja.errors import ConfigError
from chatglm_ja.messages import IGNORE_INDEX
from chatglm_ja.training import loss, train
from chatglm_ja.training.adapter import load_for_training, write_merged
from chatglm_ja.training.loss import find_trained
from chatglm_ja.training.model import (
    Collator,
    TrainingLoss,
    join_embeddings,
    split_embeddings,
)
from chatglm_ja.training.recomputation import Level, recompute_activations
from tests import tiny_models
from tests.training.runs import checkpoints_in, config_for

Row = dict[str, list[int]]


@pytest.fixture(name="model")
def small_model(resized_dir: Path) -> Any:
    return load_model(resized_dir, torch.float32, mixin=TrainingLoss)


@pytest.fixture
def documents(encoder: Any) -> list[list[int]]:
    texts = ["これは最初の文書です。", "A second one, in English.", "第三篇文档。", "短い"]
    return [[*chat_format.prefix_ids(encoder), *encoder.encode(text), 2] for text in texts]


def test_autocast_keeps_the_activations_of_float32_embeddings_in_half_precision(
    model: Any, documents: list[list[int]]
) -> None:
    model.to(torch.bfloat16).model.embed_tokens.float()
    seen: list[torch.dtype] = []
    model.model.norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].dtype))
    ids = torch.tensor([documents[0]])
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids)
    assert seen == [torch.bfloat16]


def test_labels_give_the_loss_of_transformers(model: Any, documents: list[list[int]]) -> None:
    ids = torch.tensor([documents[0]])
    loss = model(ids, labels=ids).loss
    reference = GlmForCausalLM.forward(model, ids, labels=ids).loss
    assert torch.allclose(loss, reference, rtol=1e-6)


@pytest.mark.parametrize("level", ["none", "selective", "full"])
def test_packed_conversations_train_as_padded_ones(
    model: Any, data_dir: Path, resized_dir: Path, level: Level
) -> None:
    """Loss and gradient of a step, packed into bins, and padded in micro-batches of 5."""
    model.train()
    recompute_activations(model.model.layers, read_shape(resized_dir), level)
    bins = dataset.load_rows(data_dir, "sft", "train")
    collate = Collator(document_mask=True)
    trained = sum(label != IGNORE_INDEX for row in bins["labels"] for label in row)

    def step(rows: Any, size: int) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total = 0.0
        for start in range(0, len(rows), size):
            chunk = [rows[i] for i in range(start, min(start + size, len(rows)))]
            loss = model(**collate(chunk), num_items_in_batch=trained).loss
            loss.backward()
            total += loss.item()
        return total, torch.cat([p.grad.flatten().double() for p in model.parameters()])

    loss, gradient = step(bins, len(bins))
    apart = dataset.unpack_rows(bins)
    assert len(apart) > 2 * len(bins)
    padded_loss, padded_gradient = step(apart, 5)
    assert padded_loss == pytest.approx(loss, rel=1e-5)
    assert (padded_gradient - gradient).norm() < 1e-5 * gradient.norm()


def test_logits_in_a_bin_are_those_of_the_conversation_alone(model: Any, data_dir: Path) -> None:
    """By transformers' own forward pass, and to 1e-5 of the largest logit."""
    plain = GlmForCausalLM.from_pretrained(model.config._name_or_path, dtype=torch.float32).eval()
    bins = dataset.load_rows(data_dir, "sft", "train")
    batch = Collator(document_mask=True, length=256)([bins[i] for i in range(len(bins))])
    model.eval()
    with torch.inference_mode():
        hidden = model.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).last_hidden_state
        for row, found in zip(bins, model.lm_head(hidden), strict=True):
            start = 0
            for length in row["lengths"]:
                ids = torch.tensor([row["input_ids"][start : start + length]])
                expected = plain(ids).logits[0]
                difference = (found[start : start + length] - expected).abs().max()
                assert difference < 1e-5 * expected.abs().max()
                start += length


def test_single_losses_are_those_of_the_tokens(
    model: Any, documents: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the labels, those that are not trained left out; in several chunks."""
    monkeypatch.setattr(loss, "CPU_LOSS_ROWS", 10)
    batch = Collator(document_mask=True)(
        [{"input_ids": document, "lengths": [len(document)]} for document in documents]
    )
    with torch.inference_mode():
        losses = model(**batch, reduction="none").loss
        logits = GlmForCausalLM.forward(model, batch["input_ids"]).logits
    expected = [
        -logits[row, place - 1].double().log_softmax(-1)[label].item()
        for row, labels in enumerate(batch["labels"].tolist())
        for place, label in enumerate(labels)
        if label != IGNORE_INDEX
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)


def test_without_the_document_mask_attention_crosses_documents(
    model: Any, documents: list[list[int]]
) -> None:
    """The counter-check: the tests above would notice a missing mask."""
    row: Row = {"input_ids": documents[0] + documents[1], "lengths": [len(documents[0]), 0]}
    row["lengths"][1] = len(documents[1])
    losses = []
    for masked in (True, False):
        batch = Collator(masked)([row])
        batch["labels"][0, : len(documents[0]) + 1] = IGNORE_INDEX
        batch["trained"] = find_trained(batch["labels"])
        losses.append(model(**batch).loss.item())
    assert abs(losses[0] - losses[1]) > 1e-4


def pack_with_padding(documents: list[list[int]], width: int) -> dict[str, torch.Tensor]:
    row: Row = {
        "input_ids": [*itertools.chain(*documents)],
        "lengths": [len(ids) for ids in documents],
    }
    return Collator(document_mask=True, length=width)([row])


@pytest.mark.parametrize("kind", tiny_models.SIZES)
def test_packed_documents_are_computed_as_separate_ones(tmp_path: Path, kind: str) -> None:
    """On any architecture: hidden states, loss and gradients of transformers' own class."""
    folder = tiny_models.make_tiny(kind, tmp_path)
    model = load_model(folder, torch.float32, mixin=TrainingLoss)  # in evaluation mode
    plain = load_model(folder, torch.float32)
    torch.manual_seed(1)
    documents = [torch.randint(3, 320, (size,)).tolist() for size in (9, 2, 30, 17)]
    batch = pack_with_padding(documents, 64)
    hidden = model.base_model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state
    packed = model.get_output_embeddings()(hidden)[0]
    trained = sum(len(ids) - 1 for ids in documents)
    total, start = torch.zeros(()), 0
    for ids in documents:
        logits = plain(torch.tensor([ids])).logits[0]
        found = packed[start : start + len(ids)]
        assert (found - logits).abs().max() < 1e-5 * logits.abs().max()
        total = total + F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")
        start += len(ids)
    (total / trained).backward()
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(total.item() / trained, rel=1e-5)
    for name, parameter in plain.named_parameters():
        gradient = model.get_parameter(name).grad
        assert (gradient - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-7, name
    model(**batch, reduction="none").loss.sum().backward()  # the single losses, too
    crossing = model(
        **Collator(document_mask=False)([{"input_ids": [*itertools.chain(*documents)]}])
    )
    assert abs(crossing.loss.item() - loss.item()) > 1e-3  # the mask matters


@pytest.mark.parametrize("kind", tiny_models.SIZES)
@pytest.mark.parametrize("level", ["none", "selective", "full"])
def test_bfloat16_trains_in_bfloat16(tmp_path: Path, kind: str, level: Level) -> None:
    """Frozen weights are bfloat16, trained ones float32 masters, and the loss is nearly equal."""
    folder = tiny_models.make_tiny(kind, tmp_path / "model")
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        config = config_for(folder, folder, tmp_path, gradient_checkpointing=level)
        adapted: Any = load_for_training(config, dtype)
        batch = pack_with_padding([list(range(3, 30)), list(range(40, 70))], 60)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = adapted.train(kind != "gpt2")(**batch).loss  # GPT-2 has dropout
        loss.backward()
        losses.append(loss.item())
        for name, parameter in adapted.named_parameters():
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else dtype)
            assert (parameter.grad is not None) == parameter.requires_grad, name
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def first_new(folder: Path) -> int:
    return tokenizer.load_processor(folder).piece_to_id("<|observation|>") + 1


@pytest.mark.parametrize("kind", tiny_models.SIZES)
def test_split_embeddings_of_any_architecture_compute_the_same(tmp_path: Path, kind: str) -> None:
    """Tied ones stay tied: their new rows get the gradients of both uses."""
    folder = tiny_models.make_tiny(kind, tmp_path)
    whole, split = (load_model(folder, torch.float32, mixin=TrainingLoss) for _ in range(2))
    split_embeddings(split, 300)
    ids = torch.tensor([[5, 299, 300, 301, 319, 0]])
    names = [f"{name}.weight" for name in find_embeddings(whole)]
    assert len(names) == len(find_embeddings(split))
    for either in (whole, split):
        either(ids, labels=ids).loss.backward()
    assert torch.equal(split(ids).logits, whole(ids).logits)
    parts: dict[str, Any] = find_embeddings(split)
    for name, module in parts.items():
        gradient = whole.get_parameter(f"{name}.weight").grad
        assert torch.allclose(module.new.grad, gradient[300:], atol=1e-6)
    join_embeddings(split, [whole.get_parameter(name).detach() for name in names])
    assert [f"{name}.weight" for name in find_embeddings(split)] == names
    assert torch.equal(split(ids).logits, whole(ids).logits)


def test_a_split_model_computes_the_same(resized_dir: Path) -> None:
    model: Any = GlmForCausalLM.from_pretrained(resized_dir, dtype=torch.float32)
    first = first_new(resized_dir)
    ids = torch.tensor([[5, first - 1, first, first + 1, model.config.vocab_size - 1, 0]])
    whole = model(ids).logits
    whole.square().mean().backward()
    expected = {
        name: model.get_parameter(name).grad
        for name in (tensor_names.GLM_EMBEDDING, tensor_names.GLM_LM_HEAD)
    }
    split_embeddings(model, first)
    split = model(ids).logits
    assert torch.equal(split, whole)
    split.square().mean().backward()
    for part, grad in zip(
        (model.get_input_embeddings(), model.get_output_embeddings()),
        expected.values(),
        strict=True,
    ):
        assert part.old.grad is None
        assert torch.allclose(part.new.grad, grad[first:], atol=1e-7)
    stored = GlmForCausalLM.from_pretrained(resized_dir)
    names = (tensor_names.GLM_EMBEDDING, tensor_names.GLM_LM_HEAD)
    join_embeddings(model, [stored.get_parameter(name).detach() for name in names])
    assert torch.equal(model(ids).logits, whole)
    assert sorted(model.state_dict()) == sorted(
        GlmForCausalLM.from_pretrained(resized_dir).state_dict()
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_base_s_rows_stay_and_the_new_ones_learn(
    resized_dir: Path, data_dir: Path, tmp_path: Path, precision: str
) -> None:
    """Bit-identical in the stored float16, which bfloat16 cannot represent."""
    config = config_for(
        resized_dir, data_dir, tmp_path, embedding_rows="new", save_steps=3, precision=precision
    )
    result = train.train(config, "pretrain", tmp_path, checkpoints_in(tmp_path))
    losses = [entry["loss"] for entry in result["history"] if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    write_merged(resized_dir, tmp_path)
    first = first_new(resized_dir)
    before = AutoModelForCausalLM.from_pretrained(resized_dir)
    after = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name in (tensor_names.GLM_EMBEDDING, tensor_names.GLM_LM_HEAD):
        old, new = before.get_parameter(name), after.get_parameter(name)
        assert torch.equal(old[:first], new[:first])
        assert not torch.equal(old[first:], new[first:])
    width, rows = before.config.hidden_size, before.config.vocab_size
    whole = train.train(config_for(resized_dir, data_dir, tmp_path, max_steps=1), "pretrain", None)
    assert whole["trained_parameters"] - result["trained_parameters"] == 2 * first * width
    assert first < rows


def test_the_first_loss_does_not_depend_on_the_rows(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    losses = []
    for rows in ("all", "new"):
        config = config_for(resized_dir, data_dir, tmp_path, max_steps=1, embedding_rows=rows)
        history = train.train(config, "pretrain", None)["history"]
        losses.append(next(entry["loss"] for entry in history if "loss" in entry))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_new_rows_without_embeddings_are_a_contradiction(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--embedding-rows new trains embeddings"):
        config_for(tmp_path, tmp_path, tmp_path, embedding_rows="new", train_embeddings=False)
