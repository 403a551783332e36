"""ChatGLM3's own modeling and tokenization files, patched for a model with more embedding rows.

`step8_export.py --to chatglm` writes a folder for tools that run these files (`trust_remote_code`).
Two things in them do not work with more pieces: the model class lacks the accessors through which
embeddings are resized and trained, and the tokenizer numbers its special tokens after the last
piece, new pieces included. The files are copied from the base folder, patched as text, and never
run here. Files that were patched before are left as they are.
"""

import ast
from pathlib import Path

from chatglm_ja.errors import DataError

MODELING, TOKENIZATION = "modeling_chatglm.py", "tokenization_chatglm.py"
TOKENIZER_CONFIG = "tokenizer_config.json"  # names the tokenizer's class
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
# Appended to SPTokenizer.__init__, where `special_tokens` maps the nine names, in order, to ids.
SPECIAL_IDS = """\
        # The special tokens keep the ids they had before pieces were added behind them.
        self.n_words = self.sp_model.vocab_size()
        self.special_tokens = {{
            token: {first} + offset for offset, token in enumerate(self.special_tokens)
        }}
        self.index_special_tokens = {{i: token for token, i in self.special_tokens.items()}}
"""


def find_code(base: Path) -> list[Path]:
    """Return the base's Python files and tokenizer_config.json, which names their tokenizer.

    Returns [] if the base lacks one of the two files that need a patch.
    """
    if not ((base / MODELING).is_file() and (base / TOKENIZATION).is_file()):
        return []
    config = base / TOKENIZER_CONFIG
    return [*sorted(base.glob("*.py")), *([config] if config.is_file() else [])]


def find_files(base: Path | None) -> list[Path]:
    """Return what is taken over from a base: config.json and its code, if they are there."""
    if base is None or not (base / "config.json").is_file():
        return []
    return [base / "config.json", *find_code(base)]


def read_code(base: Path, first_special: int) -> dict[str, str]:
    """Return the texts of the files that `find_code` finds, by name, patched with `patch_code`."""
    return {
        path.name: patch_code(path, path.read_text(encoding="utf-8"), first_special)
        for path in find_code(base)
    }


def patch_code(path: Path, source: str, first_special: int) -> str:
    """Return the text of one of the two files, patched, or of another file, unchanged.

    `first_special` is the id of the first special token. Raises DataError if a file to be patched
    is not ChatGLM3-6B's own, or is not Python after the patch.
    """
    class_name = {MODELING: MODEL_CLASS, TOKENIZATION: TOKENIZER_CLASS}.get(path.name)
    if class_name is None:
        return source
    nodes = _parse(source, path).body
    classes = {node.name: node.body for node in nodes if isinstance(node, ast.ClassDef)}
    if class_name not in classes:
        raise DataError(f"{path} has no class {class_name}: expected ChatGLM3-6B's own file")
    parts = classes[class_name]
    methods = {part.name: part for part in parts if isinstance(part, ast.FunctionDef)}
    if "__init__" not in methods:
        raise DataError(f"{path}: {class_name} has no __init__: expected ChatGLM3-6B's own file")
    if path.name == MODELING:
        missing = [code for method, code in ACCESSORS.items() if method not in methods]
        code = "".join("\n" + method for method in missing)
    else:
        code = SPECIAL_IDS.format(first=first_special)
    if code in source:
        return source
    lines = source.splitlines(keepends=True)
    end = methods["__init__"].end_lineno
    patched = "".join(lines[:end]).rstrip("\n") + "\n" + code + "".join(lines[end:])
    _parse(patched, path)
    return patched


def _parse(source: str, path: Path) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise DataError(f"{path} is not Python ({error.msg}, line {error.lineno})") from None
