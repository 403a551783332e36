"""Which folders can be exported: validated as a whole before anything is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.bases.families import open_model
from chatglm_ja.chatglm3 import tokenizer
from chatglm_ja.chatglm3.base_config import read_config, read_glm_config
from chatglm_ja.errors import DataError, UserError
from chatglm_ja.export.model_folder import ModelFolder

Copy = Callable[[Path, Path], Path]


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_config_says_what_the_bases_said(base_dir: Path, resized_dir: Path) -> None:
    base, model = read_config(base_dir), read_glm_config(resized_dir)
    rows = model["padded_vocab_size"]
    assert model == {name: base[name] for name in model} | {"padded_vocab_size": rows}
    assert rows > base["padded_vocab_size"]


def test_a_model_without_a_manifest_is_opened_by_its_files(
    resized_dir: Path, tmp_path: Path, copy_of: Copy
) -> None:
    opened = open_model(resized_dir, "step6_train_sft.py")
    assert opened.role == "model" and opened.manifest is None
    copy = copy_of(resized_dir, tmp_path / "copy")
    assert open_model(copy, "step6_train_sft.py").fingerprint == opened.fingerprint
    change_config(copy, note=1)
    assert open_model(copy, "step6_train_sft.py").fingerprint != opened.fingerprint


def bare_tokenizer(folder: Path) -> None:
    proto = tokenizer.read_proto(folder / tokenizer.MODEL_FILE)
    del proto.pieces[4000:]
    (folder / tokenizer.MODEL_FILE).write_bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json not found"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "has no tokenizer.model"),
        (bare_tokenizer, "is not a tokenizer that step2_merge_tokenizer.py made"),
        (lambda folder: change_config(folder, vocab_size=4096),
         r"the model has 4,096 embedding rows, but its tokenizer has 4,8\d\d ids"),
        (lambda folder: change_config(folder, vocab_size=9999), "but config.json gives"),
        (lambda folder: change_config(folder, num_hidden_layers=4), "has no tensor model.layers.3"),
        (lambda folder: change_config(folder, num_hidden_layers=2), "has a tensor model.layers.2"),
        (lambda folder: change_config(folder, model_type="llama"), "model_type is 'llama'"),
        (lambda folder: change_config(folder, rope_parameters={"rope_theta": 5e5}), "rope_param"),
        (lambda folder: change_config(folder, head_dim="16"), "head_dim is '16'"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "but the index names it"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused(
    damage: Callable[[Path], None], message: str, resized_dir: Path, tmp_path: Path, copy_of: Copy
) -> None:
    folder = copy_of(resized_dir, tmp_path / "model")
    damage(folder)
    with pytest.raises(DataError, match=message):
        ModelFolder.open(folder)


def test_a_folder_in_chatglm3s_layout_is_named(base_dir: Path) -> None:
    with pytest.raises(UserError, match="model_type is 'chatglm', expected 'glm'"):
        ModelFolder.open(base_dir)
