"""How a step ends as a program."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.pipeline import PROJECT, STEPS, only_error

IN_A_DESTRUCTOR = """
import os, signal, time
from chatglm_ja.cli import run

class Resource:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

def main():
    Resource()
    print("it goes on")
    time.sleep(30)

run(main)
"""
AFTER_THE_END = """
import atexit, os, signal, time
from chatglm_ja.cli import run

atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(0.1))
run(lambda: print("it goes on"))
"""


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [(IN_A_DESTRUCTOR, 130, "interrupted\n"), (AFTER_THE_END, 0, "")],
)
def test_ctrl_c_is_neither_lost_nor_a_traceback(program: str, status: int, said: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False,
        timeout=20,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (status, "it goes on\n", said)
    assert signal.getsignal(signal.SIGINT) != signal.SIG_IGN


SWALLOWING = """
import time
try:
    print("importing", flush=True)
    time.sleep(30)
except BaseException:
    raise ImportError("no such thing") from None
"""
STEP = """
import sys
import chatglm_ja
script = sys.argv.pop(1)
step = compile(open(script).read(), script, "exec")
print("ready", flush=True)
exec(step, {"__name__": "__main__", "__file__": script})
"""
# One write for each line, which print does not promise: two processes share the pipe.
POOL = """
import os, time
from chatglm_ja.cli import run
from chatglm_ja.data.parallel import map_in_order

def work(number):
    os.write(1, b"at work\\n")
    time.sleep(30)

if __name__ == "__main__":
    run(lambda: list(map_in_order(work, range(9), 2)))
"""


def interrupt(command: list[str], *delays: float) -> tuple[int, str]:
    """Start a program; after its first line and each delay press Ctrl-C for all its processes."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True, env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    for delay in delays:
        time.sleep(delay)
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(process.pid, signal.SIGINT)
    try:
        said = process.communicate(timeout=120)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ctrl_c_in_an_import_ends_the_process_at_once(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library may turn what passes through its imports into another error."""
    monkeypatch.setenv("RANK", rank)
    (tmp_path / "library.py").write_text(SWALLOWING)
    program = f"import sys; sys.path.append({str(tmp_path)!r}); import chatglm_ja, library"
    said = "interrupted\n" if rank == "0" else ""
    assert interrupt(["-c", program], 0.0) == (130, said)


# Between two imports, outside of every function.
BETWEEN_IMPORTS = """
import chatglm_ja
print("importing", flush=True)
while True:
    pass
"""


def test_ctrl_c_between_two_imports_is_no_traceback() -> None:
    assert interrupt(["-c", BETWEEN_IMPORTS], 0.0) == (130, "interrupted\n")


def test_ctrl_c_keeps_an_interactive_session() -> None:
    """The package may be imported at Python's own prompt."""
    lines = [
        "import chatglm_ja, os, signal",
        "os.kill(os.getpid(), signal.SIGINT)",
        "print('still here')",
    ]
    result = subprocess.run(
        [sys.executable, "-i", "-q"], input="\n".join(lines) + "\n", cwd=PROJECT,
        capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    assert result.stdout == "still here\n"


@pytest.mark.parametrize("script", STEPS)
def test_ctrl_c_while_a_step_starts_is_no_traceback(script: str, tmp_path: Path) -> None:
    command = ["-c", STEP, script, "--check", "--output-dir", str(tmp_path / "out")]
    for delay in (0.0, 0.05, 0.15):
        status, said = interrupt(command, delay)
        assert "Traceback" not in said
        # The artifacts need not be there. The step may have named its profile.
        last = said.splitlines()[-1]
        assert (status, last) == (130, "interrupted") or status in (0, 1)


@pytest.mark.parametrize("delays", [(0.0, 0.0), (0.0, 0.3), (0.0, 0.0, 0.1, 0.1)])
def test_ctrl_c_again_and_again_is_no_traceback(delays: tuple[float, ...], tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(POOL)
    status, said = interrupt([str(tmp_path / "program.py")], *delays)
    assert status == 130
    assert said.replace("at work\n", "") == "interrupted\n"


LAUNCHERS = ["step5_train_pt_multi_gpu.sh", "step6_train_sft_multi_gpu.sh"]
RunFirst = Callable[..., tuple[int, str]]
# Imports of these fail: what is wrong must be said before they are loaded.
LIBRARIES = ("torch", "transformers", "datasets", "sentencepiece", "deepspeed")


@pytest.fixture
def run_first(tmp_path: Path) -> RunFirst:
    """Run a program of the project as in a new shell, in another folder, without large libraries.

    Returns the exit status and what it prints to standard error.
    """
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({LIBRARIES}))\n"
    )

    def run_program(script: str, *flags: str, **environment: str) -> tuple[int, str]:
        program = "bash" if script.endswith(".sh") else sys.executable
        kept = {k: v for k, v in os.environ.items() if not k.startswith("CHATGLM")}
        python = str(Path(sys.executable).parent)
        added = {
            "PATH": f"{python}:{os.environ['PATH']}",
            "PYTHONPATH": str(tmp_path),
            "CHATGLM_JA_ARTIFACTS": str(tmp_path / "artifacts"),
        }
        result = subprocess.run(
            [program, str(PROJECT / script), *flags], env={**kept, **added, **environment},
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        return result.returncode, result.stderr

    return run_program


@pytest.mark.parametrize("script", [*STEPS, "demo/build_base_model.py", "demo/get_smollm2.py"])
def test_a_python_without_the_packages_is_one_line(script: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-S", str(PROJECT / script)], capture_output=True, text=True, check=False,
        cwd=tmp_path,
    )  # fmt: skip
    message = only_error(result.returncode, result.stderr)
    assert f"`source {PROJECT}/.venv/bin/activate`" in message
    assert message.endswith("pip install -r requirements.txt`")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("package", ["safetensors", "pyarrow", "pydantic", "annotated_types"])
def test_a_python_with_some_of_the_packages_is_one_line(package: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    result = subprocess.run(
        [sys.executable, str(PROJECT / "step1_train_tokenizer.py")], capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    message = only_error(result.returncode, result.stderr)
    assert f"the package {package} is not installed for {sys.executable}" in message
    assert len(result.stderr.splitlines()) == 1


def test_an_old_python_is_one_line() -> None:
    program = "import sys; sys.version_info = (3, 9, 2); import chatglm_ja"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    message = only_error(result.returncode, result.stderr)
    assert "is Python 3.9, expected 3.11 to 3.14: run `" in message


def test_other_errors_of_an_import_keep_their_traceback() -> None:
    program = "import chatglm_ja; import chatglm_ja.nothing"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("profile", "hint"),
    [
        ("chatglm3_6b", " (did you mean chatglm3-6b?)"),
        ("ChatGLM3-6B", " (did you mean chatglm3-6b?)"),
        ("chatglm", " (did you mean chatglm3-6b?)"),
        ("Demo", " (did you mean demo?)"),
        ("6b", ""),
        ("", ""),
    ],
)
@pytest.mark.parametrize("script", [STEPS[0], *LAUNCHERS])
def test_an_unknown_profile_is_one_line(
    run_first: RunFirst, script: str, profile: str, hint: str
) -> None:
    status, said = run_first(script, CHATGLM_JA_PROFILE=profile)
    profiles = "demo, smollm2, chatglm3-6b"
    expected = f"error: CHATGLM_JA_PROFILE is {profile!r}, expected one of {profiles}{hint}"
    assert only_error(status, said) == expected
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("script", [STEPS[0], STEPS[1], STEPS[2], STEPS[6]])
def test_a_base_model_that_nobody_named_is_one_line(run_first: RunFirst, script: str) -> None:
    status, said = run_first(script, CHATGLM_JA_PROFILE="chatglm3-6b")
    message = only_error(status, said)
    assert "CHATGLM3_6B_DIR is not set: set it to the folder of the downloaded" in message


@pytest.mark.parametrize(
    ("folder", "found"),
    [
        ("nowhere", "not found"),
        ("empty", "has no config.json"),
        ("sitecustomize.py", "is a file, expected the folder of the model"),
    ],
)
@pytest.mark.parametrize("script", STEPS[:3])
def test_a_wrong_folder_of_the_base_model_is_one_line(
    run_first: RunFirst,
    script: str,
    folder: str,
    found: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    status, said = run_first(script, CHATGLM_JA_PROFILE="chatglm3-6b", CHATGLM3_6B_DIR=folder)
    assert f"base model {tmp_path / folder} {found}: " in only_error(status, said)


@pytest.mark.parametrize("script", [*STEPS, *LAUNCHERS])
def test_the_first_line_names_the_profile(run_first: RunFirst, script: str) -> None:
    first = run_first(script)[1].splitlines()[0]
    assert first[len("12:34:56 ") :] == "profile demo"
    first = run_first(script, CHATGLM3_6B_DIR="/models/chatglm3-6b")[1].splitlines()[0]
    assert "profile demo; warning: it does not use CHATGLM3_6B_DIR" in first
    assert "`export CHATGLM_JA_PROFILE=chatglm3-6b`" in first


def test_other_ranks_do_not_name_the_profile(run_first: RunFirst) -> None:
    assert "profile" not in run_first(STEPS[4], RANK="1")[1]


@pytest.mark.parametrize("script", LAUNCHERS)
def test_a_launcher_looks_at_the_flags_before_it_counts_gpus(
    run_first: RunFirst, script: str
) -> None:
    status, said = run_first(script, "--max_steps", "3")
    assert only_error(status, said).endswith("(did you mean --max-steps?)")


@pytest.mark.parametrize("script", [STEPS[4], STEPS[5], *LAUNCHERS])
def test_compiling_without_a_compiler_is_one_line(run_first: RunFirst, script: str) -> None:
    missing = {"CUDA_VISIBLE_DEVICES": "", "CXX": "/nowhere/g++"}
    status, said = run_first(script, "--compile", **missing)
    assert only_error(status, said).startswith("error: --compile needs /nowhere/g++")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp932", "utf-8"])
def test_a_terminal_of_any_encoding_is_no_traceback(encoding: str) -> None:
    """What it cannot show is escaped; --help and messages hold Japanese."""
    program = (
        "import chatglm_ja.cli as cli, logging\n"
        "def main():\n"
        "    print('食べる', '한', input())\n"
        "    logging.getLogger('__main__').info('食べる')\n"
        "    raise cli.UserError('名前 \\udcff')\n"
        "cli.run(main)\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(PROJECT)}
    result = subprocess.run(
        [sys.executable, "-c", program], input="質問\n".encode(), capture_output=True,
        env=environment, check=False,
    )  # fmt: skip
    assert (result.returncode, b"Traceback" in result.stderr) == (1, False), result.stderr
    assert result.stderr.splitlines()[-1].startswith(b"error: ")
    result = subprocess.run(
        [sys.executable, str(PROJECT / STEPS[0]), "--help"], capture_output=True, env=environment,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_libraries_are_quiet_and_the_project_is_not() -> None:
    program = (
        "import chatglm_ja.cli as cli, logging\n"
        "def main():\n"
        "    for name in ('httpx2', 'anything.at.all', 'chatglm_ja.data.corpus', '__main__'):\n"
        "        logging.getLogger(name).info(name)\n"
        "    import datasets, huggingface_hub\n"
        "    for name in ('datasets', 'huggingface_hub.utils'):\n"
        "        logging.getLogger(name).warning(name)\n"
        "cli.run(main)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=PROJECT
    )
    said = [line.split()[1] for line in result.stderr.splitlines()]
    assert said == ["chatglm_ja.data.corpus", "__main__"]
