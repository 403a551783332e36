"""The losses against plain PyTorch in float32, and against float64 in half precision."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from chatglm_ja.messages import IGNORE_INDEX
from chatglm_ja.training import loss
from chatglm_ja.training.loss import find_trained, sum_losses, token_losses

VOCABULARY, WIDTH = 500, 16


def make_inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Two rows of hidden states, an output matrix, and labels of which a part is ignored."""
    torch.manual_seed(0)
    hidden = torch.randn(2, tokens // 2, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (2, tokens // 2))
    labels[0, tokens // 8 : tokens // 4] = IGNORE_INDEX
    return hidden, weight, labels


def plain_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = (hidden @ weight.T)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")


def our_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return sum_losses(hidden, [weight], labels, find_trained(labels))


def error(found: Any, exact: Any) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def gradients(total: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(total, inputs))


def test_trained_positions_are_those_before_a_label() -> None:
    n = IGNORE_INDEX
    labels = torch.tensor([[3, 4, 5, n], [6, n, n, 7], [n, n, n, n]])
    assert find_trained(labels).tolist() == [0, 1, 6]


@pytest.mark.parametrize("rows", [64, 5000])
def test_the_sum_is_the_plain_cross_entropy(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its gradients, to float32's rounding, in many chunks or one."""
    monkeypatch.setattr(loss, "CPU_LOSS_ROWS", rows)
    monkeypatch.setattr(loss, "GRADIENT_ROWS", 3 * rows)
    hidden, weight, labels = make_inputs(1200)
    found, expected = our_loss(hidden, weight, labels), plain_loss(hidden, weight, labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    pairs = zip(gradients(found, hidden, weight), gradients(expected, hidden, weight), strict=True)
    for ours, theirs in pairs:
        assert error(ours, theirs.double()) < 1e-6


def test_the_gradients_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CPU_LOSS_ROWS", 4)
    monkeypatch.setattr(loss, "GRADIENT_ROWS", 5)
    torch.manual_seed(0)
    hidden = torch.randn(2, 8, 3, dtype=torch.float64, requires_grad=True)
    old, new = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (9, 4))
    labels = torch.randint(0, 13, (2, 8))
    labels[1, 2:4] = IGNORE_INDEX
    trained = find_trained(labels)

    def compute(hidden: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        # gradcheck goes back through one result several times: each time it is computed again.
        weights = [old, new]
        total = checkpoint(sum_losses, hidden, weights, labels, trained, use_reentrant=False)
        assert isinstance(total, torch.Tensor)
        return total

    assert torch.autograd.gradcheck(compute, (hidden, old, new))


def chunked_in_half(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """What a loop over chunks in half precision computes, with autograd's sum of the gradients."""
    pairs = zip(hidden[0, :-1].split(256), labels[0, 1:].split(256), strict=True)
    parts = [F.cross_entropy(F.linear(h, weight).float(), t, reduction="sum") for h, t in pairs]
    return torch.stack(parts).sum()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_its_products(dtype: torch.dtype, autocast: bool) -> None:
    """12,000 tokens, for which a sum in bfloat16 is off by percents and one in float16 is inf.

    Against float64, no error is larger than that of a plain loop over chunks, and the gradient of
    the matrix is more exact, as it is not summed in half precision.
    """
    torch.manual_seed(0)
    hidden = torch.randn(1, 12_001, 32).to(dtype).requires_grad_()
    weight = (torch.randn(900, 32) * 2).to(dtype)
    if autocast:
        weight = weight.float()
    weight.requires_grad_()
    labels = torch.randint(0, 900, (1, 12_001))
    rows, matrix = (x.detach().double().requires_grad_() for x in (hidden, weight))
    reference = plain_loss(rows, matrix, labels)
    expected = [reference, *gradients(reference, rows, matrix)]
    errors = []
    for compute in (our_loss, chunked_in_half):
        with torch.autocast("cpu", dtype, enabled=autocast):
            total = compute(hidden, weight, labels)
        found = [total, *gradients(total, hidden, weight)]
        assert [x.dtype for x in found] == [torch.float32, hidden.dtype, weight.dtype]
        errors.append([error(*pair) for pair in zip(found, expected, strict=True)])
    ours, plain = errors
    assert ours[0] < 1e-4
    assert ours[1] < 1.01 * plain[1]
    assert ours[2] < 0.7 * plain[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scale_of_the_loss_is_not_rounded(dtype: torch.dtype) -> None:
    """The loss is divided by the trained tokens of a step, and multiplied by a GradScaler."""
    hidden, weight, labels = make_inputs(2000, dtype)
    scale = 2.0**16 / 12_345
    found = gradients(our_loss(hidden, weight, labels) * scale, hidden, weight)
    rows, matrix = (x.detach().float().requires_grad_() for x in (hidden, weight))
    with torch.autocast("cpu", dtype):
        expected = gradients(our_loss(rows, matrix, labels), rows, matrix)
    for half, single in zip(found, expected, strict=True):
        torch.testing.assert_close(half, (single * scale).to(dtype), rtol=0, atol=0)


def count_products(
    hidden: torch.Tensor, weights: list[torch.Tensor], labels: torch.Tensor
) -> float:
    """Return the operations forward and backward in products of all tokens with 500 rows."""
    with FlopCounterMode(display=False) as counter:
        sum_losses(hidden, weights, labels, find_trained(labels)).backward()
    return counter.get_total_flops() / (2 * len(find_trained(labels)) * VOCABULARY * WIDTH)


def test_a_loss_takes_three_products_and_frozen_rows_two() -> None:
    hidden, weight, labels = make_inputs(1200)
    assert count_products(hidden, [weight], labels) == 3
    parts = [weight.detach()[:400], weight.detach()[400:].clone().requires_grad_()]
    assert count_products(hidden, parts, labels) == pytest.approx(2 + 100 / VOCABULARY)
    assert parts[0].grad is None
    assert parts[1].grad is not None and weight.grad is not None
    torch.testing.assert_close(parts[1].grad, weight.grad[400:])
    assert count_products(hidden, [weight.detach()], labels) == 2


def test_labels_that_train_nothing_have_no_loss() -> None:
    hidden, weight, labels = make_inputs(100)
    total = our_loss(hidden, weight, torch.full_like(labels, IGNORE_INDEX))
    assert total.item() == 0
    for gradient in gradients(total, hidden, weight):
        assert not gradient.any()


def test_a_second_backward_pass_is_refused() -> None:
    """It would find the stored gradients scaled."""
    hidden, weight, labels = make_inputs(100)
    total = our_loss(hidden, weight, labels)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [True, False])
def test_single_losses_are_exact_in_half_precision(
    dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given hidden states in half precision, each loss is that of float64; few logits exist at a
    time."""
    monkeypatch.setattr(loss, "CPU_LOSS_ROWS", 10)
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 300, 64).to(dtype), torch.randn(500, 64).to(dtype)
    labels = torch.randint(0, 500, (2, 300))
    labels[0, :100] = IGNORE_INDEX
    rows: list[int] = []
    linear = F.linear

    def counted(*given: torch.Tensor) -> torch.Tensor:
        rows.append(len(given[0]))
        return linear(*given)

    monkeypatch.setattr(F, "linear", counted)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = token_losses(hidden, weight, labels)
    scores = (hidden[:, :-1].double() @ weight.double().T).log_softmax(-1)
    expected = F.nll_loss(scores.mT, labels[:, 1:], reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(
        losses.double(), expected[labels[:, 1:] != IGNORE_INDEX], rtol=1e-5, atol=1e-4
    )
    assert max(rows) == 10
