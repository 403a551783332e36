"""The sizes of a model, from its config.json alone.

Nothing here imports torch before `read_shape` is called: --help needs this module.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from chatglm_ja.bases import families
from chatglm_ja.chatglm3 import base_config
from chatglm_ja.errors import ConfigError, DataError


@dataclass(frozen=True)
class Linear:
    """A linear layer: the last part of its name, such as q_proj, and its sizes."""

    name: str
    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        """Parameters of its matrix."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model whose layers are alike.

    stages          the linear layers of a layer in the order of the forward pass; those of a stage
                    have the same input. The first is queries, keys and values, the second the
                    attention's output, the last the MLP's
    rows            rows of an embedding matrix
    embeddings      embedding matrices: one if they are tied, otherwise two
    other_weights   parameters outside of the embedding matrices
    positions       the longest input, in tokens
    """

    layers: int
    stages: tuple[tuple[Linear, ...], ...]
    hidden: int
    heads: int
    rows: int
    embeddings: int
    other_weights: int
    positions: int

    @property
    def attention(self) -> int:
        """Size of the attention's output: that of all heads."""
        return self.stages[1][0].inputs

    @property
    def ffn(self) -> int:
        """Size of the MLP's activation."""
        return self.stages[-1][0].inputs

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of a layer."""
        return tuple(linear for stage in self.stages for linear in stage)

    @property
    def embedding_weights(self) -> int:
        """Parameters of the embedding matrices."""
        return self.embeddings * self.rows * self.hidden

    @property
    def weights(self) -> int:
        """All parameters."""
        return self.other_weights + self.embedding_weights

    def find_linears(self, names: Collection[str]) -> tuple[Linear, ...]:
        """Return the linear layers of a layer that have these names; all of them without names.

        Raises ConfigError for a name that no layer has.
        """
        known = dict.fromkeys(linear.name for linear in self.linears)
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"--lora-targets names {name}: the layers of this model have {', '.join(known)}"
                )
        return tuple(linear for linear in self.linears if not names or linear.name in names)

    def lora_weights(self, rank: int, targets: Iterable[Linear]) -> int:
        """Return the parameters of LoRA matrices of this rank on the `targets` of every layer."""
        return self.layers * rank * sum(linear.inputs + linear.outputs for linear in targets)


def read_shape(folder: Path) -> ModelShape:
    """Read the sizes of a model folder, ChatGLM3's or transformers', from its config.json.

    Raises DataError if the file is missing or damaged, or describes a model that cannot be trained.
    """
    if not (folder / "config.json").is_file():
        raise DataError(
            f"{folder / 'config.json'} not found: the sizes are read from it; give the folder of a "
            "base model, or of step3_resize_model.py, as --model"
        )
    if families.is_chatglm3(folder):
        published = base_config.read_config(folder)
        rows = published["padded_vocab_size"]
        config = base_config.glm_config(published, rows, None)
    else:
        from chatglm_ja.bases.transformers import read_model_config

        config = read_model_config(folder)
    from chatglm_ja.bases.modules import measure

    try:
        return measure(config)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from None
    except Exception as error:  # whatever transformers raises for sizes that make no model
        reason = " ".join(str(error).split())
        path = folder / "config.json"
        raise DataError(f"{path} describes no model that transformers builds: {reason}") from None
