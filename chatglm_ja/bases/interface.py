"""What the pipeline asks of a base model, whatever its family.

A family is three classes. The rooms above know only these interfaces; families.py finds the family
of a folder.

    Base             a base model's folder: vocabulary, weights, configuration     steps 1 to 3
    Vocabulary       its tokenizer, as steps 1 and 2 extend it                     steps 1 and 2
    ModelTokenizer   any model folder's tokenizer: texts, conversations as ids     steps 4 to 7
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm_ja.messages import Message

if TYPE_CHECKING:  # numpy and torch take a moment to import, and --help needs this module
    import numpy as np
    import torch

    from chatglm_ja.storage.weights import Weights


class FormatError(Exception):
    """A conversation cannot be written in the base's format; `reason` is a few words."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class ModelTokenizer(ABC):
    """The tokenizer of a model folder. A text never becomes a special token.

    size             number of ids
    pieces           the tokens by id, as the tokenizer spells them
    first_new_id     the id of the first piece that step 2 added; `size` if it added none
    document_start   the ids that begin every text that the model reads
    document_end     the id that ends a document
    pad_id           an id that fills rows; it is masked wherever it stands
    special_ids      the ids of special tokens, which no text gives
    """

    size: int
    pieces: Sequence[str]
    first_new_id: int
    document_start: list[int]
    document_end: int
    pad_id: int
    special_ids: frozenset[int]

    @property
    @abstractmethod
    def stop_ids(self) -> list[int]:
        """The ids that end an answer."""

    @property
    def prefix(self) -> list[int]:
        """The ids after which a text is scored: `document_start`, or the end of another document.

        A model cannot score a token that follows nothing.
        """
        return self.document_start or [self.document_end]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Tokenize a text, without `document_start`. Raises DataError for a lone surrogate."""

    @abstractmethod
    def encode_documents(self, texts: Sequence[str]) -> "list[np.ndarray]":
        """Tokenize many texts, int32 each: the ids of `encode` at the speed that a corpus needs."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens have none."""

    @abstractmethod
    def spell(self, text: str) -> list[str]:
        """Return the tokens of a text in a readable form, for reports."""

    @abstractmethod
    def split_pieces(self, first: int) -> list[list[int]]:
        """Return for every piece from id `first` on the ids below it that spell it in a text."""

    @abstractmethod
    def to_transformers(self) -> Any:
        """Return the tokenizer as AutoTokenizer loads it."""

    @property
    @abstractmethod
    def has_chat_format(self) -> bool:
        """Whether conversations can be written; without it building one raises DataError."""

    @abstractmethod
    def build_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokenize a conversation that the assistant answers next. Raises FormatError."""

    @abstractmethod
    def build_example(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Return ids and labels, of equal length, of a conversation for training.

        Labels are the ids of the assistant's answers and calls, from where `build_prompt` ends to
        the token that ends the answer, and IGNORE_INDEX elsewhere. Raises FormatError.
        """


class Vocabulary(ABC):
    """A base's BPE vocabulary, as steps 1 and 2 extend it. An extended one is another object.

    A piece is a string: of characters, or of bytes if `in_bytes`, each written as the character
    that the tokenizer's files have for it. Two pieces side by side merge if the vocabulary has the
    piece that they make; of several such pairs the one of the lowest rank merges first.

    in_bytes          whether pieces are of bytes, and may begin and end inside a character
    size              the ids so far; new pieces take the next ones
    pieces            the pieces that texts are merged from and into, in the order in which `split`
                      and `encode` number them; None for numbers of anything else
    special_tokens    the tokens that are not made from text, by name
    reserved          the number of entries of step 1's file that hold nothing learned
    """

    in_bytes: bool
    size: int
    pieces: Sequence[str | None]
    special_tokens: Sequence[str]
    reserved: int

    @abstractmethod
    def __contains__(self, piece: str) -> bool:
        """Return whether the piece, or a special token of this name, has an id."""

    @abstractmethod
    def content_of(self, piece: str) -> str | bytes:
        """Return the characters or bytes of a piece, as policies read them."""

    @abstractmethod
    def content_of_text(self, text: str) -> str | bytes:
        """Return the characters or bytes of a text, as pieces are made from them."""

    @abstractmethod
    def find_missing(self, characters: Iterable[str]) -> list[str]:
        """Return the characters that no piece can spell, and that need one of their own."""

    @abstractmethod
    def split(self, lines: Sequence[str], num_threads: int) -> "tuple[np.ndarray, ...]":
        """Tokenize lines as they stand inside a text, special tokens as text.

        Returns the tokens of all lines, int32 [tokens]; the number of tokens of each line [lines];
        and which tokens begin a stretch, bool [tokens]. New pieces form inside a stretch only.
        """

    @abstractmethod
    def encode(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the tokens of each text, special tokens as text."""

    @abstractmethod
    def segment(self, pieces: Sequence[str]) -> list[list[str]]:
        """Return what merging makes of each piece, on its own inside a text."""

    @abstractmethod
    def merge_rank(self, left: str, right: str) -> float:
        """Return the rank of the merge of two symbols; infinity if they do not merge."""

    @abstractmethod
    def extend(self, pieces: Sequence[str]) -> "Vocabulary":
        """Return the vocabulary with new pieces, whose merges rank after all others, in order."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into step 2's folder. Raises DataError if they do not load
        as they should.
        """

    @abstractmethod
    def make_line_encoder(self) -> Callable[[Sequence[str]], list[list[int]]] | None:
        """Return a function that tokenizes lines as a second form of the saved tokenizer will.

        None if the folder has only the form that `ModelTokenizer` reads.
        """

    @abstractmethod
    def save_learned(
        self, merges: Sequence[tuple[str, str]], characters: Sequence[str], folder: Path
    ) -> None:
        """Write step 1's files: the pairs of pieces that merge, in order, then new characters."""

    @abstractmethod
    def read_learned(self, path: Path) -> list[str]:
        """Read the pieces that step 1 learned, in order, from its folder or its file.

        Raises DataError for a damaged file, or one for another kind of vocabulary.
        """


@dataclass(frozen=True)
class Description:
    """What reports and the model card say of a base.

    name           as people call it
    model_class    transformers' class of the resized model
    prefix         the tokens that the tokenizer puts before a text, as they are spelled
    sampling       how generation_config.json samples
    license_file   the file with its license, where the base was published
    license_name   the license's name on the hub, if the base's is known
    license_note   a sentence on the license, or ""
    """

    name: str
    model_class: str
    prefix: str
    sampling: str
    license_file: str | None
    license_name: str | None = None
    license_note: str = ""


class Base(ABC):
    """A base model's folder, opened and validated once per step.

    first_new_id   the id of the first piece that step 2 adds: it follows all ids of the base
    rows           rows of the embedding matrices, those after the last id included
    window         the longest input in tokens
    """

    folder: Path
    first_new_id: int
    rows: int
    window: int

    @property
    @abstractmethod
    def tokenizer(self) -> ModelTokenizer:
        """The base's own tokenizer."""

    @property
    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """The vocabulary to extend. Raises DataError for a kind that cannot be extended."""

    @property
    @abstractmethod
    def weights(self) -> "Weights":
        """The weights, validated when they are first used. Raises DataError if they are damaged."""

    @property
    @abstractmethod
    def embeddings(self) -> dict[str, str]:
        """The embedding matrices, input first: stored name -> the name in the resized model.

        One entry if they are tied.
        """

    @abstractmethod
    def convert(self, name: str, tensor: "torch.Tensor") -> "Iterator[tuple[str, torch.Tensor]]":
        """Yield a stored tensor under the names, and with the shapes, of the resized model."""

    @abstractmethod
    def describe(self) -> Description:
        """Return what reports say of this base."""

    @abstractmethod
    def save_config(self, folder: Path, rows: int, ids: int) -> None:
        """Write config.json and generation_config.json of the resized model into its folder.

        The model has `rows` embedding rows, of which the first `ids` have tokens.
        """

    @abstractmethod
    def load(self, dtype: "torch.dtype") -> Any:
        """Load the base as transformers' model, in evaluation mode."""
