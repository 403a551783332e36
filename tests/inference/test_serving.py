"""transformers' own server and chat work with the folders that the steps publish."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.inference import generation, models
from chatglm_ja.reports.render import TEMPLATES

for package in ("fastapi", "uvicorn", "openai", "rich"):
    pytest.importorskip(package, reason="needs requirements-extras.txt")

TRANSFORMERS = str(Path(sys.executable).parent / "transformers")
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
QUESTION = "<|user|> 日本の首都はどこですか？"


@pytest.fixture(scope="module")
def server(resized_dir: Path) -> Iterator[str]:
    """The address of a server with the resized model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [TRANSFORMERS, "serve", str(resized_dir), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--dtype", "float32"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, process.communicate()[0].decode()
                assert time.monotonic() < deadline
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def expected(resized_dir: Path) -> str:
    model = models.load_model(resized_dir)
    # The chat template breaks up text that would become a special token.
    message = {"role": "user", "content": QUESTION.replace("<|user|>", "< |user|>")}
    prompt = model.tokenizer.build_prompt([message])
    # Which the template's prompt goes on to.
    line_break = model.tokenizer.encode("\n")
    model.model.float()
    return generation.generate_answers(model, [[*prompt, *line_break]], 12)[0].text


def test_the_code_on_the_model_card_runs(resized_dir: Path, capsys: pytest.CaptureFixture) -> None:
    card = (TEMPLATES / "model_card.md.jinja").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    code = code.replace("max_new_tokens=256", "max_new_tokens=4")
    exec(compile(code.replace("FOLDER", str(resized_dir)), "card", "exec"), {})
    assert capsys.readouterr().out.strip()


def ask(server: str, folder: Path, **settings: Any) -> str:
    body: dict[str, Any] = {
        "model": str(folder),
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 12,
        **settings,
    }
    request = urllib.request.Request(
        f"{server}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: str = json.load(response)["choices"][0]["message"]["content"]
    return answer


def test_the_server_gives_our_answer(server: str, resized_dir: Path, expected: str) -> None:
    assert ask(server, resized_dir, temperature=0).strip() == expected


def test_the_server_samples(server: str, resized_dir: Path, expected: str) -> None:
    """Whether a client gives a temperature or leaves the folder's settings as they are."""
    for settings in ({"temperature": 0.8}, {}):
        answers = {ask(server, resized_dir, **settings) for _ in range(3)}
        assert len(answers) > 1 and answers != {expected}, settings


def test_the_chat_shows_our_answer(
    server: str, resized_dir: Path, expected: str, tmp_path: Path
) -> None:
    flags = ["max_new_tokens=12", "do_sample=False"]
    result = subprocess.run(
        [TRANSFORMERS, "chat", str(resized_dir), server, *flags],
        input=f"{QUESTION}\nN\n!exit\n",
        env=ENVIRONMENT | {"COLUMNS": "400"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    shown = "".join(result.stdout.split())
    assert "".join(expected.split()) in shown, result.stdout + result.stderr
