"""Step 8: the finished model for other programs, as GGUF or in ChatGLM3's own layout.

Reads   <artifacts>/step6_sft/, or with --model step5_pt/ or step3_model/; for --to chatglm also the
        Python files of <base model>/
Writes  <artifacts>/step8_export/  model-F16.gguf, Modelfile; or ChatGLM3's files
Run     python step8_export.py                                  for llama.cpp, Ollama, LM Studio
        python step8_export.py --dtype q8_0 --output-dir DIR    half the size
        python step8_export.py --to chatglm --output-dir DIR    for tools that know only ChatGLM3
"""

from chatglm_ja.cli import run  # first: it makes Ctrl-C during the other imports quiet

# isort: split
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import constants
from chatglm_ja.bases.families import open_model
from chatglm_ja.chatglm3.remote_code import find_files
from chatglm_ja.export.settings import ExportConfig, Target
from chatglm_ja.settings import parse
from chatglm_ja.storage.files import FileRecord
from chatglm_ja.storage.inputs import open_files
from chatglm_ja.storage.output import Output

log = logging.getLogger(__name__)


def main() -> None:
    config = parse(ExportConfig, __doc__, constants.STEP8, profile=constants.PROFILE_LINE)
    steps = ("step6_train_sft.py", "step5_train_pt.py", "step3_resize_model.py")
    inputs = [open_model(config.model, *steps, every_byte=config.verify)]
    if config.to is Target.CHATGLM:
        inputs.append(open_files("base_files", *find_files(config.base_model)))
    output = Output(config, Path(__file__).stem, inputs)
    if config.check:
        open_export(config)
    if not output.prepare():
        return

    export = open_export(config)
    with output.write() as folder:
        counts, output.records = export(folder)
        output.counts.update(counts)
    log.info("exported model: %s", config.output_dir)


def open_export(
    config: ExportConfig,
) -> Callable[[Path], tuple[dict[str, Any], dict[str, FileRecord]]]:
    """Open all that is read, and return the function that writes the export into a folder.

    It returns the counts of the manifest, and the records of files that it has hashed already.
    """
    from chatglm_ja.export import gguf_file, original_layout
    from chatglm_ja.export.model_folder import ModelFolder

    if config.to is Target.GGUF:
        gguf_file.require_gguf()
        model = ModelFolder.open(config.model)
        return lambda folder: (gguf_file.write_gguf(model, config.dtype, folder), {})
    model = ModelFolder.open(config.model)
    base = original_layout.read_base(model, config.base_model)
    size = int(config.max_shard_gb * 1e9)
    return functools.partial(original_layout.write_original_layout, model, base, size)


if __name__ == "__main__":
    run(main)
