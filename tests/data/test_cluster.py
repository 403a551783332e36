"""The pool on a Ray cluster: two machines of one core each, simulated by two raylets."""

import functools
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.data import cluster, parallel, prepare_texts
from chatglm_ja.errors import ConfigError, DataError
from tests.data import cluster_tasks
from tests.data.test_prepare_texts import flawed, make_files, small_parts
from tests.pipeline import free_port


@pytest.fixture(scope="module")
def raylets() -> Iterator[Any]:
    """A cluster of two machines; the second may be removed."""
    pytest.importorskip("ray", reason="needs requirements-extras.txt")
    from ray.cluster_utils import Cluster

    size: Any = {"num_cpus": 1, "object_store_memory": 10**8}
    # A lost machine is missed after 3 s instead of 15.
    head: Any = {"include_dashboard": False, "_system_config": {"health_check_period_ms": 500}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # 15 would make a busy machine slow
        raylets: Any = Cluster(initialize_head=True, head_node_args=size | head)
        try:
            raylets.second = raylets.add_node(**size)
            raylets.wait_for_nodes()
            yield raylets
        finally:
            raylets.shutdown()


@pytest.fixture
def machines(raylets: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The cluster, named by RAY_ADDRESS."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", raylets.address)
    yield raylets
    ray.shutdown()


def test_tasks_run_in_the_callers_folder_and_their_errors_reach_it(
    machines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("A")
    found = list(parallel.map_in_order(cluster_tasks.describe, ["a.txt"] * 20, 2))
    assert {pair[:2] for pair in found} == {("A", str(tmp_path))}
    with pytest.raises(DataError, match=r"^bad item$"):
        list(parallel.map_in_order(cluster_tasks.describe, ["a.txt", "bad", "a.txt"], 2))
    with pytest.raises(DataError, match=r"largest machine .* needs 1000000.0 TB"):
        list(parallel.map_in_order(cluster_tasks.describe, ["a.txt"], 2, 10**18))
    monkeypatch.setattr(cluster, "MAX_RETRIES", 0)
    with pytest.raises(DataError, match=r"lost a task's machine or process in 1 attempts"):
        list(parallel.map_in_order(cluster_tasks.die, range(2), 2))


def test_a_lost_machine_changes_no_byte(
    machines: Any, tmp_path: Path, merged_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch)
    sources = flawed(tmp_path)
    with monkeypatch.context() as patch:
        patch.delenv("RAY_ADDRESS")
        expected = make_files(tmp_path / "one", merged_dir, sources)
    assert cluster.connect(tmp_path) == 2
    marker, doomed = tmp_path / "marker", machines.second.node_id
    hang = functools.partial(cluster_tasks.tokenize_or_hang, marker, doomed)
    monkeypatch.setattr(prepare_texts, "tokenize_texts", hang)

    def remove() -> None:
        while not marker.exists():
            time.sleep(0.05)
        machines.remove_node(machines.second, allow_graceful=False)

    thread = threading.Thread(target=remove, daemon=True)
    thread.start()
    assert make_files(tmp_path / "lost", merged_dir, sources, num_processes=2) == expected
    thread.join(timeout=10)
    assert marker.exists() and not thread.is_alive()


def test_a_machine_without_the_disk_or_the_packages_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    find_problem = cluster._problem_finder()
    seen = tmp_path / "seen"
    assert "does not see the file" in str(find_problem(str(seen)))
    seen.touch()
    assert find_problem(str(seen)) is None
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "chatglm_ja.data.prepare_texts", None)
        problem = str(find_problem(str(seen)))
        assert "cannot import the project" in problem and str(cluster.PROJECT) in problem
    monkeypatch.chdir("/")
    (tmp_path / "seen").unlink()
    tmp_path.rmdir()
    assert "cannot work in this one's folder" in str(find_problem("/"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:{port}", r"can be used there \(.*Connection refused.*`ray start --head"),
        ("cluster", "it is neither HOST:PORT nor auto"),
    ],
)
def test_a_cluster_that_does_not_answer_is_an_error_at_once(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="needs requirements-extras.txt")
    monkeypatch.setenv("RAY_ADDRESS", address.format(port=free_port()))
    with pytest.raises(ConfigError, match=rf"^RAY_ADDRESS is {re.escape(address[:5])}.*{message}"):
        cluster.connect(tmp_path)


def test_a_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"package ray is not installed: .*requirements-extras"):
        cluster.connect(tmp_path)
