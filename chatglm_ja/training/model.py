"""The model for training and scoring.

`Collator` makes batches of step 4's rows. `TrainingLoss` makes any of transformers' causal language
models compute the losses of loss.py. `split_embeddings` leaves only the embeddings' new rows
trainable, and `join_embeddings` restores plain matrices after training, in float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import create_masks_for_generate, packed_sequence_mask_function
from transformers.modeling_outputs import CausalLMOutputWithPast

from chatglm_ja.bases.modules import find_embeddings
from chatglm_ja.errors import ConfigError
from chatglm_ja.messages import IGNORE_INDEX
from chatglm_ja.training.loss import find_trained, sum_losses, token_losses


@dataclass(frozen=True)
class Collator:
    """Collates rows into int64 tensors [rows, longest row]: input_ids, labels, position_ids.

    The second dimension is at least `length`: compiled layers need batches of one shape. The batch
    also has `trained`, which is find_trained(labels).

    With `document_mask`, positions restart at every document, and its first token, which nothing
    before it predicts, is not trained. Without it a row is one document, and there are no
    position_ids. Padding is a document of its own and is never trained, so any id serves: it is 0.
    """

    document_mask: bool
    length: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(self.length, *(len(row["input_ids"]) for row in rows))
        shape = (len(rows), longest)
        batch = {
            "input_ids": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORE_INDEX),
            "position_ids": torch.zeros(shape, dtype=torch.int64),
        }
        for index, row in enumerate(rows):
            size = len(row["input_ids"])
            labels = row["labels"] if "labels" in row else row["input_ids"]
            batch["input_ids"][index, :size] = torch.tensor(row["input_ids"])
            batch["labels"][index, :size] = torch.tensor(labels)
            start = 0
            for length in [*(row["lengths"] if self.document_mask else [size]), longest - size]:
                batch["position_ids"][index, start : start + length] = torch.arange(length)
                if length:
                    batch["labels"][index, start] = IGNORE_INDEX
                start += length
        batch["trained"] = find_trained(batch["labels"])
        if not self.document_mask:
            del batch["position_ids"]  # attention is faster without a mask of documents
        return batch


class TrainingLoss:
    """Mixin of a causal language model: given labels, it returns the loss and no logits.

    With `position_ids` that restart, attention stays inside each document. `loading.check_training`
    tells the architectures of which this, or the loss, is not true.
    """

    accepts_loss_kwargs = True

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        trained: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        reduction: Literal["mean", "none"] = "mean",
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the loss of input_ids, position_ids and labels, int64 [batch, length].

        The loss is the sum over the trained tokens divided by `num_items_in_batch`, by default
        their number in this batch. With the reduction "none" it is that of `token_losses`. The host
        does not wait for a GPU if `trained` and `position_ids` are given.
        """
        if labels is None:
            plain: Any = super()
            return plain.forward(input_ids, position_ids=position_ids, **kwargs)
        model: Any = self
        # Autocast leaves the output of float32 embeddings, and all that is added to it, in float32,
        # which would double the activations.
        embedded = model.get_input_embeddings()(input_ids)
        if torch.is_autocast_enabled(embedded.device.type):
            embedded = embedded.to(torch.get_autocast_dtype(embedded.device.type))
        mask = None
        if position_ids is not None:
            # The model would make the same mask, but first read from the GPU whether any restart.
            documents = packed_sequence_mask_function((position_ids == 0).cumsum(1))
            mask = create_masks_for_generate(
                model.config, embedded, None, None, and_mask_function=documents
            )
        hidden = model.base_model(
            inputs_embeds=embedded, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        head = model.get_output_embeddings()
        if reduction == "none":
            return CausalLMOutputWithPast(loss=token_losses(hidden, head.weight, labels))
        if trained is None:
            trained = find_trained(labels)
        total = sum_losses(hidden, list(head.parameters()), labels, trained)
        count = len(trained) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / count)


class _Rows(nn.Module):
    """A matrix whose last rows are trained: old [first, width], new [rows - first, width].

        input embedding  [ old: frozen | new: trained ]     the base's ids | new pieces
        output matrix    [ old: frozen | new: trained ]

    Gradients, float32 masters and moments exist for the new rows only: with 13,741 new pieces of
    ChatGLM3-6B, 0.11 B parameters instead of 0.64 B. Tied matrices share both parts.
    """

    def __init__(self, old: nn.Parameter, new: nn.Parameter) -> None:
        super().__init__()
        self.old, self.new = old, new

    @classmethod
    def split(cls, weight: torch.Tensor, first: int) -> Self:
        """Split a matrix before row `first`; the trained part is float32."""
        old = nn.Parameter(weight[:first].clone(), requires_grad=False)
        return cls(old, nn.Parameter(weight[first:].float()))

    @property
    def weight(self) -> torch.Tensor:
        """The whole matrix, concatenated."""
        return torch.cat([self.old, self.new.to(self.old.dtype)])

    def replace_last_rows(self, stored: torch.Tensor) -> nn.Parameter:
        """Return a stored matrix with the trained rows in place of its last ones, float32, CPU."""
        rows = torch.cat([stored[: len(self.old)].float(), self.new.detach().float().cpu()])
        return nn.Parameter(rows, requires_grad=False)


class NewRowsEmbedding(_Rows):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up ids, int64 [...], in both parts without concatenating them: [..., width]."""
        first = len(self.old)
        old = F.embedding(ids.clamp(max=first - 1), self.old)
        new = F.embedding((ids - first).clamp(min=0), self.new).to(old.dtype)
        return torch.where((ids >= first)[..., None], new, old)


class NewRowsHead(_Rows):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight)


def split_embeddings(model: Any, first: int) -> None:
    """Make only the rows from id `first` on trainable, in the embedding matrices.

    Raises ConfigError for an embedding that does more than look rows up, as Gemma's, which scales.
    """
    whole = model.get_input_embeddings()
    if type(whole) is not nn.Embedding:
        raise ConfigError(
            f"--embedding-rows new is for plain embeddings, but this model has "
            f"{type(whole).__name__}: pass --embedding-rows all"
        )
    is_tied = len(find_embeddings(model)) == 1
    embedding = NewRowsEmbedding.split(whole.weight.data, first)
    if is_tied:
        head = NewRowsHead(embedding.old, embedding.new)
    else:
        head = NewRowsHead.split(model.get_output_embeddings().weight.data, first)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)


def join_embeddings(model: Any, stored: Sequence[torch.Tensor]) -> None:
    """Undo `split_embeddings`: plain float32 matrices with the trained rows in place.

    The old rows are taken from the stored matrices, input first, one if they are tied: training may
    have rounded them.
    """
    parts: list[Any] = list(find_embeddings(model).values())
    weights = [part.replace_last_rows(rows) for part, rows in zip(parts, stored, strict=True)]
    rows, width = weights[0].shape
    embedding = nn.Embedding(rows, width, device="meta")
    head = nn.Linear(width, rows, bias=False, device="meta")
    embedding.weight, head.weight = weights[0], weights[-1]
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
