"""ChatGLM3's own modeling and tokenization files, patched for a model with more embedding rows.

`--layout chatglm` writes a folder for tools that run these files (`trust_remote_code`). Two things
in them do not work with more pieces: the model class lacks the accessors through which embeddings
are resized and trained, and the tokenizer numbers its special tokens after the last piece, new
pieces included. The files are copied from the base folder, patched as text, and never run here.
"""

import ast
import shutil
from pathlib import Path

from chatglm_ja.chatglm3.base import Base
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
# Appended to SPTokenizer.__init__, where `special_tokens` maps the nine names, in order, to ids.
SPECIAL_IDS = """\
        # The special tokens keep the ids they had before pieces were added behind them.
        self.n_words = self.sp_model.vocab_size()
        self.special_tokens = {{
            token: {first} + offset for offset, token in enumerate(self.special_tokens)
        }}
        self.index_special_tokens = {{i: token for token, i in self.special_tokens.items()}}
"""


def copy_patched_code(base: Base, output: Path) -> bool:
    """Copy the base's Python files and tokenizer_config.json, with two of them patched.

    Returns False, with nothing copied, if the base has no remote code. Raises DataError as
    `patch_code` does.
    """
    patched = patch_code(base)
    if patched:
        for path in [*sorted(base.folder.glob("*.py")), base.folder / "tokenizer_config.json"]:
            if path.is_file():
                shutil.copyfile(path, output / path.name)
    for name, text in patched.items():
        (output / name).write_text(text, encoding="utf-8")
    return bool(patched)


def patch_code(base: Base) -> dict[str, str]:
    """Return the base's two files that need a patch, patched, by name; {} if it has none.

    Raises DataError if a file is not ChatGLM3-6B's own, or is not Python after the patch.
    """
    folder = base.folder
    if not ((folder / MODELING).is_file() and (folder / TOKENIZATION).is_file()):
        return {}
    texts = {}
    for name, class_name in ((MODELING, MODEL_CLASS), (TOKENIZATION, TOKENIZER_CLASS)):
        path = folder / name
        source = path.read_text(encoding="utf-8")
        nodes = _parse(source, path).body
        classes = {node.name: node.body for node in nodes if isinstance(node, ast.ClassDef)}
        if class_name not in classes:
            raise DataError(f"{path} has no class {class_name}: expected ChatGLM3-6B's own file")
        parts = classes[class_name]
        methods = {part.name: part for part in parts if isinstance(part, ast.FunctionDef)}
        if "__init__" not in methods:
            raise DataError(
                f"{path}: {class_name} has no __init__: expected ChatGLM3-6B's own file"
            )
        if name == MODELING:
            missing = [code for method, code in ACCESSORS.items() if method not in methods]
            code = "".join("\n" + method for method in missing)
        else:
            code = SPECIAL_IDS.format(first=len(base.proto.pieces))
        lines = source.splitlines(keepends=True)
        end = methods["__init__"].end_lineno
        patched = "".join(lines[:end]).rstrip("\n") + "\n" + code + "".join(lines[end:])
        _parse(patched, path)
        texts[name] = patched
    return texts


def _parse(source: str, path: Path) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise DataError(f"{path} is not Python ({error.msg}, line {error.lineno})") from None
