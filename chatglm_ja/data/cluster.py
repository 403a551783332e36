"""The process pool on a Ray cluster: step 4 on several machines.

RAY_ADDRESS names the cluster, as for every program that uses Ray: HOST:PORT, or auto for the one
that this machine belongs to. Its machines have the packages of requirements.txt, and see one disk
under the same paths, with the project on it. They write their results there, and read their parts
of uncompressed files; what goes through Ray is paths, counts, and the text of other files.

A task on a machine that is lost runs again on another one, and writes the same bytes. Ray's
processes start with the project on their path, and enter the caller's folder before a task.
"""

import importlib.util
import logging
import os
import re
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.storage.disk import format_bytes

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

PROJECT = Path(__file__).parents[2]
# Ray itself tries for five minutes.
CONNECT_SECONDS = 5
# How often a task is started again whose machine or process was lost.
MAX_RETRIES = 3
_ADDRESS = re.compile(r"(?:ray://)?\[?(?P<host>[^/]+?)\]?:(?P<port>\d+)")


def is_named() -> bool:
    """Return whether RAY_ADDRESS names a cluster."""
    return bool(os.environ.get("RAY_ADDRESS"))


def connect(folder: Path) -> int:
    """Connect to the cluster and check its machines; return the number of their CPUs.

    `folder` is one that they must all see. Raises ConfigError without the package ray, if no
    cluster answers, and for a machine without the shared disk, the project's code or its packages.
    """
    ray = _connect()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    find_problem = ray.remote(num_cpus=0)(_problem_finder())
    with tempfile.NamedTemporaryFile(dir=folder.absolute(), prefix=".seen-by-all-") as file:
        checks = []
        for node in nodes:
            pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                node["NodeID"], soft=False
            )
            checks.append(find_problem.options(scheduling_strategy=pinned).remote(file.name))
        for node, check in zip(nodes, checks, strict=True):
            try:
                problem = ray.get(check)
            except ray.exceptions.RayError as error:
                problem = f"ran no task ({error})"
            if problem:
                raise ConfigError(
                    f"machine {node['NodeManagerAddress']} of the Ray cluster {problem}; or unset "
                    "RAY_ADDRESS to use this machine alone"
                )
    cpus = _count_cpus(ray)
    log.info("Ray cluster %s: %d machines, %d CPUs", os.environ["RAY_ADDRESS"], len(nodes), cpus)
    return cpus


def _connect() -> Any:
    """Return the module ray, connected to the cluster."""
    address = os.environ["RAY_ADDRESS"]
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            f"RAY_ADDRESS is {address}, but the package ray is not installed: run `pip install -r "
            "requirements-extras.txt`, or unset RAY_ADDRESS to use this machine alone"
        )
    import ray

    if ray.is_initialized():
        return ray
    try:
        if address not in ("auto", "local"):
            place = _ADDRESS.fullmatch(address)
            if not place:
                raise ValueError("it is neither HOST:PORT nor auto")
            host, port = place["host"], int(place["port"])
            socket.create_connection((host, port), CONNECT_SECONDS).close()
        environment = {
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(PROJECT), os.environ.get("PYTHONPATH")))
            ),
            "TOKENIZERS_PARALLELISM": "false",  # there is a task for each CPU already, see cli.py
        }
        ray.init(
            address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": environment},
        )
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"RAY_ADDRESS is {address}, but no Ray cluster can be used there ({error}): start one "
            "with `ray start --head --port 6379`, or unset RAY_ADDRESS to use this machine alone"
        ) from None
    return ray


def _count_cpus(ray: Any) -> int:
    return int(ray.cluster_resources().get("CPU", 0)) or 1


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], task_bytes: int
) -> Iterator[Result]:
    """Yield `function(item)` for each item, as `parallel.map_in_order` does.

    At most two items per CPU are drawn ahead. A machine runs only as many tasks of `task_bytes` at
    a time as its memory holds.
    """
    ray = _connect()
    most = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    if task_bytes > most:  # Ray would wait for a larger machine
        raise DataError(
            f"the largest machine of the Ray cluster has {format_bytes(most)} for tasks, but one "
            f"needs {format_bytes(task_bytes)}: pass --near-duplicates 0, or add a machine"
        )
    run = ray.remote(_run).options(num_cpus=1, max_retries=MAX_RETRIES, memory=task_bytes or None)
    shared, folder = ray.put(function), Path.cwd()
    waiting: deque[Any] = deque()
    try:
        for item in items:
            waiting.append(run.remote(folder, shared, item))
            # Machines may join or be lost meanwhile.
            if len(waiting) >= 2 * _count_cpus(ray):
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error  # without the lines of Ray's own
    except ray.exceptions.RayError as error:
        raise DataError(
            f"the Ray cluster lost a task's machine or process in {MAX_RETRIES + 1} attempts, "
            f"probably for lack of memory ({error}): run `ray start` with a lower --num-cpus"
        ) from error
    finally:
        for task in waiting:
            ray.cancel(task)


def _run(folder: Path, function: Callable[[Item], Result], item: Item) -> Result:
    os.chdir(folder)
    return function(item)


def _problem_finder() -> Callable[[str], str | None]:
    """Return a function that finds what keeps a machine from running tasks.

    Ray pickles functions inside of functions as code. Of others it pickles the module's name, and
    the machine may not find the module.
    """
    folder, project = str(Path.cwd()), str(PROJECT)
    python = "Python {}.{}".format(*sys.version_info)

    def find_problem(file: str) -> str | None:
        """Return what is wrong with a machine and what to do, or None."""
        if not os.path.exists(file):
            return (
                f"does not see the file {file} that was just written here, expected a disk that "
                "all machines share: mount it there under the same path"
            )
        try:
            os.chdir(folder)
            import chatglm_ja.data.prepare_conversations
            import chatglm_ja.data.prepare_texts  # noqa: F401
        except OSError as error:
            return f"cannot work in this one's folder ({error}): start the step on the shared disk"
        except ImportError as error:
            return (
                f"cannot import the project ({error}), expected {project} on the shared disk, and "
                f"{python} with its packages: run `pip install -r requirements.txt ray` there in "
                "the environment that starts Ray"
            )
        return None

    return find_problem
