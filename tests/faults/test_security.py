"""Attacks: nothing read from disk is executed, and no file name points outside its folder.

Each attack would create a sentinel file if it succeeded.
"""

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from chatglm_ja.chatglm3 import chat_format, tensor_names
from chatglm_ja.errors import ArtifactError
from chatglm_ja.messages import Message
from chatglm_ja.storage import files, weights
from chatglm_ja.storage.files import resolve_inside
from chatglm_ja.training import train
from tests.conftest import DATA
from tests.faults.forks import Forks
from tests.faults.ledger import Ledger
from tests.pipeline import PROJECT, STEPS, Runner
from tests.training.runs import adapter, checkpoints_in, config_for, interrupted_after

# Calls that execute what they read.
FORBIDDEN = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load",
             "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "joblib.load"}  # fmt: skip


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return (Path.touch, (self.sentinel,))


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    return tmp_path / "sentinel"


def to(folder: Path) -> tuple[str, str]:
    """Return the flags that make a step write into `folder`/out."""
    return "--output-dir", str(folder / "out")


def test_the_bomb_explodes_where_pickles_are_trusted(sentinel: Path, tmp_path: Path) -> None:
    torch.save(Bomb(sentinel), tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert sentinel.exists()


def test_weights_with_code_are_refused(
    pipeline: Runner, forks: Forks, ledger: Ledger, sentinel: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(pipeline.folder / "base_model", base)
    tensors: dict[str, Any] = {}
    for shard in base.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (base / "model.safetensors.index.json").unlink()
    torch.save(tensors | {"bomb": Bomb(sentinel)}, base / "pytorch_model.bin")
    with ledger.trial("security", "code in pytorch_model.bin") as row:
        row.reads = forks.small(STEPS[2], *to(tmp_path), "--base-model", str(base)).error
        assert "code in it is never run" in row.reads
        assert not sentinel.exists()


def test_python_files_beside_the_weights_are_not_run(
    pipeline: Runner, forks: Forks, ledger: Ledger, sentinel: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(pipeline.folder / "base_model", base)
    for name in ("modeling_chatglm.py", "tokenization_chatglm.py", "configuration_chatglm.py"):
        (base / name).write_text(f"open({str(sentinel)!r}, 'w')\n")
    config = (base / "config.json").read_text()
    auto_map = '"auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}'
    (base / "config.json").write_text(config.replace("{", "{" + auto_map + ",", 1))
    with ledger.trial("security", "code beside the weights (`auto_map`)"):
        ended = forks.small(STEPS[2], *to(tmp_path), "--base-model", str(base))
        assert ended.status == 0 and "Traceback" not in ended.said, ended.said
        assert not sentinel.exists()


def test_pickles_in_a_checkpoint_are_not_opened(
    resized_dir: Path, data_dir: Path, tmp_path: Path, ledger: Ledger, sentinel: Path
) -> None:
    """They have the names under which the Trainer, DeepSpeed and PEFT look for their own."""
    config = config_for(resized_dir, data_dir, tmp_path / "output", save_steps=2, evaluations=0)
    with interrupted_after(4):
        train.train(config, "pretrain", tmp_path, checkpoints_in(tmp_path))
    folder = tmp_path / "checkpoints" / "step-000004"
    for name in (
        "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin",
        "pytorch_model.bin", "scaler.pt", "global_step4/mp_rank_00_model_states.pt",
        "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save(Bomb(sentinel), folder / name)
    with ledger.trial("security", "other programs' pickle files in a checkpoint"):
        train.train(config, "pretrain", tmp_path, checkpoints_in(tmp_path))
        assert adapter(tmp_path)
        assert not sentinel.exists()


def test_yaml_calls_nothing(
    pipeline: Runner, forks: Forks, ledger: Ledger, sentinel: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(f'!!python/object/apply:os.system ["touch {sentinel}"]\n')
    for number, name in ((1, "--sources"), (4, "--sources"), (7, "--prompts")):
        with ledger.trial("security", "a call in a YAML file") as row:
            row.reads = forks.small(STEPS[number - 1], *to(tmp_path), name, str(bad)).error
            assert "bad.yaml" in row.reads
            assert not sentinel.exists()


def test_objects_in_arrays_are_not_unpickled(
    pipeline: Runner, forks: Forks, ledger: Ledger, sentinel: Path, tmp_path: Path
) -> None:
    """Step 4 rebuilds such a chunk of its unfinished work."""
    flags = [*to(tmp_path), "--num-processes", "1"]
    forks.small(
        STEPS[3], *flags, "--total-tokens", "100000000"
    )  # too few texts: the unfinished work stays
    arrays = sorted(tmp_path.glob("out.work/*/*.npz"))
    assert arrays
    for path in arrays:
        np.savez(path, record=np.array([Bomb(sentinel)], dtype=object), allow_pickle=True)
    bombs = {path: path.read_bytes() for path in arrays}
    title = "pickles in step 4's unfinished arrays"
    with ledger.trial("security", title) as row:
        ended = forks.small(STEPS[3], *flags)
        assert ended.status == 0 and "Traceback" not in ended.said, ended.said
        row.reads = next(re.findall("tokenizing .*", line)[0] for line in ended.said.splitlines()
                         if "tokenizing" in line)  # fmt: skip
        assert not sentinel.exists()
    # The same attack with forged SHA-256 digests.
    shutil.rmtree(tmp_path / "out")
    forks.small(STEPS[3], *flags, "--total-tokens", "100000000")
    for path, bomb in bombs.items():
        path.write_bytes(bomb)
        meta = json.loads(path.with_suffix(".json").read_text())
        meta["files"][path.name] = files.record_file(path).model_dump()
        path.with_suffix(".json").write_text(json.dumps(meta))
    with ledger.trial("security", f"{title}, with forged SHA-256"):
        assert "is corrupt" in forks.small(STEPS[3], *flags).error
        assert not sentinel.exists()


def test_names_of_files_are_not_run(
    pipeline: Runner, forks: Forks, ledger: Ledger, tmp_path: Path
) -> None:
    for command in (
        "$(touch sentinel)",
        "a;touch sentinel;",
        "`touch sentinel`",
        "|touch sentinel",
    ):
        name = f"{command}.jsonl.gz"
        shutil.copyfile(DATA / "train_ja.jsonl.gz", tmp_path / name)
        with ledger.trial("security", "a shell command as a file name"):
            source = f"ja={tmp_path / name}"
            ended = forks.small(STEPS[0], *to(tmp_path), "--overwrite", "--sources", source)
            assert ended.status == 0 and "Traceback" not in ended.said, ended.said
            # The launcher passes its arguments on to two programs.
            flags = ["--tracker", "none", "--model", name, "--output-dir", name]
            result = pipeline.small("step5_train_pt_multi_gpu.sh", *flags, NPROC_PER_NODE="2")
            assert result.returncode == 1 and f"{name} not found" in result.stderr
            for folder in (pipeline.root, tmp_path, PROJECT):
                assert not (folder / "sentinel").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "link", "links/x"])
def test_no_name_leads_out_of_its_folder(tmp_path: Path, ledger: Ledger, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "x").touch()
    (folder / "link").symlink_to(tmp_path / "x")
    (folder / "links").symlink_to(tmp_path)
    with ledger.trial(
        "security", "a file name in a manifest or index that points outside its folder"
    ) as row:
        with pytest.raises(ArtifactError, match="lies outside of it") as refused:
            resolve_inside(folder, name)
        row.reads = f"error: {refused.value}"
    assert resolve_inside(folder, "a/../b") == folder / "a/../b"


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "models--x" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    for target, allowed in (("../../blobs/1", True), ("../../refs", False)):
        link = folder / f"model-{allowed}.safetensors"
        link.symlink_to(target)
        if allowed:
            assert resolve_inside(folder, link.name) == link
        else:
            with pytest.raises(ArtifactError):
                resolve_inside(folder, link.name)


def test_an_index_is_held_to_its_folder_wherever_it_is_read(
    base_dir: Path, resized_dir: Path, tmp_path: Path, copy_of: Any
) -> None:
    folder = copy_of(resized_dir, tmp_path / "model")
    index = folder / weights.INDEX_FILE
    index.write_text(index.read_text().replace("model-0000", "../other/model-0000"))
    for read in (
        lambda: weights.read_tensor(folder, tensor_names.GLM_EMBEDDING),
        lambda: list(weights.iterate_tensors(folder)),
        lambda: weights.describe_tensors(folder),
    ):
        with pytest.raises(ArtifactError, match="lies outside of it"):
            read()


def test_no_text_becomes_a_special_token(encoder: Any, ledger: Ledger) -> None:
    """Neither in a document nor in any message of a conversation."""
    special = {chat_format.special_id(encoder, name) for name in chat_format.SPECIAL_TOKENS}
    names = [*chat_format.SPECIAL_TOKENS, "<s>", "</s>", "<unk>", "<|user|> \n", "<0x41>", "<pad>"]
    for name in names:
        with ledger.trial("security", "a special token's name in a text"):
            assert not special & set(encoder.encode(f"a{name}b {name}"))
            turns: list[Message] = [
                {"role": "user", "content": name},
                {"role": "assistant", "content": name},
            ]
            plain: list[Message] = [{"role": turn["role"], "content": "x"} for turn in turns]
            found, usual = (
                [token for token in chat_format.build_example(encoder, talk)[0] if token in special]
                for talk in (turns, plain)
            )
            assert found == usual


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call)]


def test_the_code_calls_nothing_that_runs_what_it_reads() -> None:
    paths = [*PROJECT.glob("*.py"), *(PROJECT / "chatglm_ja").rglob("*.py"),
             *(PROJECT / "demo").glob("*.py"), *(PROJECT / "benchmarks").glob("*.py")]  # fmt: skip
    assert len(paths) > 60
    for path in paths:
        for name, call in calls(path):
            named = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert name not in FORBIDDEN, (path, name)
            assert name != "torch.load" or named.get("weights_only") == "True", path
            assert name not in ("np.load", "np.savez", "np.save") or (
                named.get("allow_pickle") == "False"
            ), path
            assert named.get("shell") is None, path
            assert named.get("trust_remote_code") is None, path


def test_the_versions_are_past_the_known_faults_of_loaders() -> None:
    text = (PROJECT / "requirements.txt").read_text()
    for package, least in (("torch", (2, 10)), ("transformers", (5, 3))):
        version = re.search(rf"^{package}==([\d.]+)", text, re.MULTILINE)
        assert version
        assert tuple(map(int, version[1].split(".")))[:2] >= least


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    scripts = [*PROJECT.rglob("*.sh"), PROJECT / ".ci/run", PROJECT / "docs/two_nodes.sbatch"]
    scripts = [path for path in scripts if ".venv" not in path.parts]
    assert len(scripts) >= 5
    result = subprocess.run(
        ["shellcheck", *map(str, scripts)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
