"""The package's subpackages import each other in one direction only."""

import ast

import pytest

from tests.pipeline import PROJECT

PACKAGE = PROJECT / "chatglm_ja"
# From the bottom up; "" stands for the modules at the top of the package.
ORDER = ("", "storage", "chatglm3", "bases", "data", "vocabulary", "training", "inference",
         "evaluation", "reports", "export")  # fmt: skip


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    allowed = ORDER[: ORDER.index(room) + 1]
    for path in (PACKAGE / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("chatglm_ja"):
                names = (node.module or "").split(".")[1:] or [node.names[0].name]
                imported = names[0] if (PACKAGE / names[0]).is_dir() else ""
                assert imported in allowed, f"{path.name}:{node.lineno} imports {node.module}"
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} == {
        *ORDER
    } - {""}
