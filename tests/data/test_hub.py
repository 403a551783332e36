"""Data sets by name, from a mirror of the hub, and from the cache when it does not answer."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.data import hub as hub_module
from chatglm_ja.errors import ArtifactError
from chatglm_ja.sources import Source
from tests.conftest import PROJECT
from tests.data.hub_server import serving

# The addresses are read when the libraries are imported: a process for each.
PROGRAM = """
import json, logging, sys
from chatglm_ja.data import readers
from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source

logging.basicConfig(format="%(message)s", level=logging.ERROR)
logging.getLogger("chatglm_ja").setLevel(logging.INFO)
found = []
for fields in json.loads(sys.argv[1]):
    source = Source("ja", **fields)
    try:
        chunks = readers.read_chunks(source)
        found.append([r["text"] for c in chunks for _, r in readers.read_records(c, source)])
    except DataError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def put(root: Path, name: str, file: str, *texts: str) -> None:
    path = root / name / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def read(
    *sources: dict[str, Any], endpoint: str, cache: Path, **environment: str
) -> tuple[list[Any], str]:
    """Return the texts of each source, or why it could not be read; and standard error."""
    variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "PYTHONPATH": str(PROJECT)}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(sources)],
        env=os.environ | variables | environment,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout), ended.stderr


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    put(root, "me/texts", "data/train-00000-of-00002.jsonl", "一", "二")
    put(root, "me/texts", "data/train-00001-of-00002.jsonl", "三")
    put(root, "me/texts", "data/test-00000-of-00001.jsonl", "試験")
    put(root, "me/secret", "train.jsonl", "秘密")
    put(root, "me/terms", "terms.jsonl", "条件")
    put(root, "me/tested", "test.jsonl", "試験")
    put(root, "me/languages", "ja/a.jsonl", "日本語")
    put(root, "me/languages", "zh/a.jsonl", "中文")
    (root / "me/languages/README.md").write_text(
        "---\nconfigs:\n"
        + "".join(f"- {{config_name: {name}, data_files: {name}/*}}\n" for name in ("ja", "zh"))
        + "---\n"
    )
    (root / "me/table").mkdir()
    (root / "me/table/train.csv").write_text("text\n甲\n乙\n", encoding="utf-8")
    return root


def test_sets_of_a_mirror_and_of_its_cache(hub: Path, tmp_path: Path) -> None:
    texts = {"path": "me/texts"}
    with serving(hub, {"me/secret": "hf_mine"}, {"me/old": "me/texts"}) as endpoint:
        found, said = read(
            texts, {"path": "me/texts", "split": "test"}, {"path": "me/secret"},
            {"path": "me/tested"}, {"path": "me/none"}, {"path": "me/old"}, {"path": "me/terms"},
            endpoint=endpoint, cache=tmp_path, HF_TOKEN="hf_mine",
        )  # fmt: skip
        private, _ = read({"path": "me/secret"}, endpoint=endpoint, cache=tmp_path / "other")
    assert found[:3] == [["一", "二", "三"], ["試験"], ["秘密"]]
    assert "does not have the split 'train'" in found[3] and "['test']" in found[3]
    assert "me/none is neither a local file nor a data set" in found[4]
    assert found[5] == found[0]
    assert "terms.jsonl of me/terms could not be downloaded (403" in found[6]
    assert "set HF_TOKEN if it is private" in private[0]
    assert "GET" not in said and "HTTP" not in said
    # The server is gone.
    started = time.monotonic()
    found, said = read(texts, {"path": "me/none"}, endpoint=endpoint, cache=tmp_path)
    assert found[0] == ["一", "二", "三"]
    assert "the hub does not answer, and the cache does not hold it" in found[1]
    assert said.count(f"the hub {endpoint} does not answer") == 1
    assert time.monotonic() - started < 20  # two sets, and the imports
    found, said = read(texts, endpoint=endpoint, cache=tmp_path, HF_HUB_OFFLINE="1")
    assert found == [["一", "二", "三"]]
    assert "answer" not in said


def test_only_what_is_asked_for_is_downloaded(hub: Path, tmp_path: Path) -> None:
    chinese = {"path": "me/languages", "subset": "zh"}
    with serving(hub) as endpoint:
        found, said = read(
            chinese, {"path": "me/languages"}, {"path": "me/languages", "subset": "ko"},
            endpoint=endpoint, cache=tmp_path,
        )  # fmt: skip
    assert found[0] == ["中文"] and said.count("downloading") == 1
    assert "['ja', 'zh']" in found[1] and "['ja', 'zh']" in found[2]
    assert [path.parent.name for path in tmp_path.rglob("a.jsonl")] == ["zh"]
    # Without the hub, the other configuration is known to be missing.
    found, _ = read(
        chinese, {"path": "me/languages", "subset": "ja"}, endpoint=endpoint, cache=tmp_path
    )
    assert found[0] == ["中文"] and "the cache does not hold it" in found[1]


def test_a_cache_that_lacks_a_file_is_not_read(hub: Path, tmp_path: Path) -> None:
    with serving(hub) as endpoint:
        read({"path": "me/texts"}, endpoint=endpoint, cache=tmp_path)
        (second,) = tmp_path.rglob("train-00001-of-00002.jsonl")
        second.unlink()
    found, _ = read({"path": "me/texts"}, endpoint=endpoint, cache=tmp_path)
    assert "the hub does not answer, and the cache does not hold it" in found[0]


def test_other_formats_and_parts_of_a_split_are_loaded_by_datasets(
    hub: Path, tmp_path: Path
) -> None:
    with serving(hub) as endpoint:
        found, _ = read(
            {"path": "me/table"}, {"path": "me/texts", "split": "train[1:]+test"},
            endpoint=endpoint, cache=tmp_path,
        )  # fmt: skip
    assert found == [["甲", "乙"], ["二", "三", "試験"]]


def test_a_set_for_which_the_disk_has_no_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listing = hub_module.Listing(name="me/large", commit="c", sizes={"train.jsonl": 10**18})
    monkeypatch.setattr(hub_module, "_list_files", lambda *_: listing)
    monkeypatch.setattr(hub_module, "_go_offline_if_silent", lambda: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ArtifactError, match=r"takes about 1000000.0 TB.*set HF_HOME"):
        hub_module.download_files(Source("ja", "me/large"))


def test_a_changed_revision_is_fetched_again(hub: Path, tmp_path: Path) -> None:
    with serving(hub) as endpoint:
        put(hub, "me/changing", "train.jsonl", "前")
        assert read({"path": "me/changing"}, endpoint=endpoint, cache=tmp_path)[0] == [["前"]]
        put(hub, "me/changing", "train.jsonl", "後")
        assert read({"path": "me/changing"}, endpoint=endpoint, cache=tmp_path)[0] == [["後"]]
