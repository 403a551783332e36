"""ChatGLM3's own modeling and tokenization files, mended for a model with more embedding rows.

`--layout chatglm` writes a folder for tools that run these files (`trust_remote_code`). Two things
in them do not fit a grown vocabulary: the model class lacks the accessors through which embeddings
are resized and trained, and the tokenizer counts its special tokens' ids on from the last piece
instead of from where they have always been. The files are the base folder's own; they are read as
text and never run here.
"""

import ast
import shutil
from pathlib import Path

from chatglm_ja.errors import DataError

MODELING, TOKENIZATION = "modeling_chatglm.py", "tokenization_chatglm.py"
MODEL_CLASS, TOKENIZER_CLASS = "ChatGLMForConditionalGeneration", "SPTokenizer"

ACCESSORS = {
    "get_input_embeddings": """\
    def get_input_embeddings(self):
        return self.transformer.embedding.word_embeddings
""",
    "set_input_embeddings": """\
    def set_input_embeddings(self, value):
        self.transformer.embedding.word_embeddings = value
""",
    "get_output_embeddings": """\
    def get_output_embeddings(self):
        return self.transformer.output_layer
""",
    "set_output_embeddings": """\
    def set_output_embeddings(self, new_embeddings):
        self.transformer.output_layer = new_embeddings
""",
}
# At the end of SPTokenizer.__init__, where `special_tokens` maps the nine names, in order, to ids.
SPECIAL_IDS = """\
        # The special tokens keep the ids they had before pieces were added behind them.
        self.n_words = self.sp_model.vocab_size()
        self.special_tokens = {{
            token: {first} + offset for offset, token in enumerate(self.special_tokens)
        }}
        self.index_special_tokens = {{i: token for token, i in self.special_tokens.items()}}
"""


def copy_patched_code(base: Path, output: Path, first_special_id: int) -> bool:
    """Copy the base's Python files and tokenizer_config.json, the two files patched.

    False if the base has no remote code, and nothing is copied. Raises DataError when a file is
    not what is known of it, or would not parse after the patch.
    """
    if not ((base / MODELING).is_file() and (base / TOKENIZATION).is_file()):
        return False
    for path in [*sorted(base.glob("*.py")), base / "tokenizer_config.json"]:
        if path.is_file():
            shutil.copyfile(path, output / path.name)
    for name, patch in (
        (MODELING, add_accessors),
        (TOKENIZATION, lambda source, path: fix_special_ids(source, path, first_special_id)),
    ):
        source = patch((base / name).read_text(encoding="utf-8"), base / name)
        _parse(source, output / name)
        (output / name).write_text(source, encoding="utf-8")
    return True


def add_accessors(source: str, path: Path) -> str:
    """Give the model class those of the four embedding accessors that it does not define."""
    model = _class(source, path, MODEL_CLASS)
    defined = {node.name for node in model.body if isinstance(node, ast.FunctionDef)}
    missing = [code for name, code in ACCESSORS.items() if name not in defined]
    return _insert(source, _init(model, path).end_lineno, "".join("\n" + code for code in missing))


def fix_special_ids(source: str, path: Path, first_special_id: int) -> str:
    """Let the special tokens' ids start at `first_special_id` for any number of pieces."""
    init = _init(_class(source, path, TOKENIZER_CLASS), path)
    return _insert(source, init.end_lineno, SPECIAL_IDS.format(first=first_special_id))


def _insert(source: str, line: int | None, code: str) -> str:
    lines = source.splitlines(keepends=True)
    return "".join(lines[:line]).rstrip("\n") + "\n" + code + "".join(lines[line:])


def _class(source: str, path: Path, name: str) -> ast.ClassDef:
    for node in _parse(source, path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise DataError(f"{path} has no class {name}: expected ChatGLM3-6B's own file")


def _init(node: ast.ClassDef, path: Path) -> ast.FunctionDef:
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return part
    raise DataError(f"{path}: {node.name} has no __init__: expected ChatGLM3-6B's own file")


def _parse(source: str, path: Path) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise DataError(f"{path} is not Python ({error.msg}, line {error.lineno})") from None
