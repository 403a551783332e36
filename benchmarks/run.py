"""Run all speed and memory benchmarks in one session and write docs/benchmarks.md.

Runs the other programs of this folder one after the other, each alone on the machine. The page
holds their ratios and tables, the machine, and all versions. A benchmark that cannot run here, for
lack of a GPU, of ChatGLM3-6B's files or of LLaMA-Factory, is listed with what it needs.

    python benchmarks/run.py --work-dir SCRATCH --base-model CHATGLM3_6B_DIR \\
        --ja-tokenizer ja_bpe.model --llamafactory lf/bin/python \\
        --sources ja=docs_ja.jsonl.gz zh=docs_zh.jsonl.gz en=docs_en.jsonl.gz

Takes an hour on two cores, and 60 GB of disk space for step 3 at 6B size. From CHATGLM3_6B_DIR only
config.json and tokenizer.model are read. --ja-tokenizer is a sentencepiece model (here: the
article's). llamafactory_data.py says how to install LLaMA-Factory. Steps 1 to 5 of the demo are run
first unless they are finished. --work-dir keeps each benchmark's output and a draft of the page.
docs/benchmarks.md is replaced only when every benchmark that can run has succeeded, and never with
--only.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import shutil
import string
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# In this folder; importing it makes the project's package importable.
from measuring import PROJECT, step_command, table

from chatglm_ja.cli import run
from chatglm_ja.errors import DataError

log = logging.getLogger(__name__)

FOLDER = PROJECT / "benchmarks"
PAGE = PROJECT / "docs" / "benchmarks.md"
DEMO = PROJECT / "artifacts" / "demo"
PACKAGES = ("torch", "transformers", "tokenizers", "sentencepiece", "peft", "deepspeed")


@dataclass(frozen=True)
class Benchmark:
    """A program of this folder.

    In its flags, {option} is replaced by the value of an option of run.py or by an input that
    prepare() makes (MADE_FROM). Without a value the benchmark cannot run.
    """

    title: str
    script: str
    flags: str = ""
    may_use: tuple[str, ...] = ()  # options that are passed on if given
    gpu: bool = False

    @property
    def values(self) -> list[str]:
        return [name for _, name, _, _ in string.Formatter().parse(self.flags) if name]


# The inputs that prepare() makes, and the options that each requires.
MADE_FROM: dict[str, tuple[str, ...]] = {
    "demo": (), "tokenizer": ("base_model", "ja_tokenizer"), "conversations": ()
}  # fmt: skip

BENCHMARKS = (
    Benchmark("How soon a step answers", "startup.py"),
    Benchmark(
        "Learning and merging the vocabulary",
        "vocabulary.py",
        "--base-model={base_model} --sources {sources}",
        may_use=("ja_tokenizer",),
    ),
    Benchmark(
        "Step 3 at 6B size",
        "resize_6b.py",
        "--base-model={base_model} --tokenizer={tokenizer} --work-dir={work_dir}/resize",
    ),
    Benchmark(
        "Preparing text",
        "data.py",
        "--tokenizer={tokenizer} --sources {sources} --work-dir={work_dir} --memory-gb=1 "
        "--edited-documents=300 --search-millions 1 8",
        may_use=("llamafactory",),
    ),
    Benchmark(
        "Step 4 on a Ray cluster",
        "cluster.py",
        "--tokenizer={tokenizer} --sources {sources}",
    ),
    Benchmark(
        "Continued pretraining beside LLaMA-Factory",
        "training.py",
        "--base-model={base_model} --ja-tokenizer={ja_tokenizer} --llamafactory={llamafactory} "
        "--work-dir={work_dir}/training --steps=10",
    ),
    Benchmark(
        "Fine-tuning beside LLaMA-Factory",
        "sft.py",
        "--llamafactory={llamafactory} --work-dir={work_dir}/sft",
    ),
    Benchmark(
        "Loading the model in several processes",
        "host_memory.py",
        "--work-dir={work_dir}/host_memory",
    ),
    Benchmark(
        "What ZeRO-2 sends",
        "zero2_traffic.py",
        "--model={demo}/step3_model --data={demo}/step4_data --block-size=256",
    ),
    Benchmark(
        "Training at 6B size",
        "train_6b.py",
        "--work-dir={work_dir}/6b --tokenizer={demo}/step2_tokenizer "
        "--conversations={conversations}",
        gpu=True,
    ),
    Benchmark("Step 7 at 6B size", "eval_6b.py", "--base-model={base_model}", gpu=True),
)


@dataclass
class Section:
    """The result of a benchmark: a section of the page."""

    benchmark: Benchmark
    said: str = ""  # its tables
    missing: str = ""  # why it did not run, or failed
    minutes: float = 0.0
    ratios: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)


def main() -> None:
    arguments = parse_arguments()
    chosen = [b for b in BENCHMARKS if not arguments.only or b.script in arguments.only]
    sections = [Section(benchmark, missing=missing(benchmark, arguments)) for benchmark in chosen]
    possible = [section for section in sections if not section.missing]
    if not possible:
        raise DataError(f"nothing can be measured: {sections[0].missing}")
    state = revision()  # before the files can change on disk
    values = prepare(arguments, possible)
    draft = arguments.work_dir / PAGE.name
    for number, section in enumerate(possible, 1):
        log.info("%d of %d: %s", number, len(possible), section.benchmark.script)
        measure(section, values)
        text = page(sections, own_command(arguments), state)
        draft.write_text(text, encoding="utf-8")
    failed = [section.benchmark.script for section in possible if section.missing]
    if failed:
        raise DataError(f"{', '.join(failed)} failed: what they said is above; see {draft}")
    if arguments.only:
        log.info("written: %s", draft)
    else:
        shutil.copyfile(draft, PAGE)
        log.info("written: %s", PAGE)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="folder on a large disk")
    parser.add_argument(
        "--base-model", type=Path, help="folder with config.json and tokenizer.model"
    )
    parser.add_argument("--ja-tokenizer", type=Path, help="a sentencepiece BPE model of Japanese")
    parser.add_argument(
        "--sources", nargs="+", metavar="LANGUAGE=FILE", help="texts in ja, zh and en"
    )
    parser.add_argument("--llamafactory", help="Python interpreter of its environment")
    scripts = [benchmark.script for benchmark in BENCHMARKS]
    parser.add_argument(
        "--only",
        nargs="+",
        choices=scripts,
        help="run only these benchmarks; writes a draft in --work-dir",
    )
    arguments = parser.parse_args()
    for path in (arguments.base_model, arguments.ja_tokenizer):
        if path and not path.exists():
            parser.error(f"{path} not found")
    languages = {source.partition("=")[0] for source in arguments.sources or ()}
    if arguments.sources and languages != {"ja", "zh", "en"}:
        parser.error(f"--sources are of {', '.join(sorted(languages))}, expected ja, zh and en")
    for source in arguments.sources or ():
        if not Path(source.partition("=")[2].partition("#")[0]).exists():
            parser.error(f"--sources {source}: no such file")
    if arguments.llamafactory and shutil.which(arguments.llamafactory) is None:
        parser.error(f"--llamafactory {arguments.llamafactory} is no program")
    return arguments


def missing(benchmark: Benchmark, arguments: argparse.Namespace) -> str:
    """Return why a benchmark cannot run here, or an empty string."""
    if benchmark.gpu and shutil.which("nvidia-smi") is None:
        return "not measured in this run: it needs a GPU"
    options = [option for name in benchmark.values for option in MADE_FROM.get(name, (name,))]
    wanted = [flag(name) for name in dict.fromkeys(options) if not getattr(arguments, name)]
    return f"not measured in this run: it needs {' and '.join(wanted)}" if wanted else ""


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# Running


def prepare(arguments: argparse.Namespace, sections: Sequence[Section]) -> dict[str, Any]:
    """Run the demo's steps 1 to 5 and make the benchmarks' inputs.

    Returns the values of all options and the folders of the inputs.
    """
    work_dir: Path = arguments.work_dir
    work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer, conversations = work_dir / "tokenizer", work_dir / "conversations"
    steps = ["step1_train_tokenizer", "step2_merge_tokenizer", "step3_resize_model",
             "step4_prepare_data", "step5_train_pt"]  # fmt: skip
    commands = [[sys.executable, str(PROJECT / "demo" / "build_base_model.py")]]
    commands += [[sys.executable, str(PROJECT / f"{step}.py")] for step in steps]
    wanted = {name for section in sections for name in section.benchmark.values}
    if "tokenizer" in wanted:
        merge = step_command("step2_merge_tokenizer", tokenizer, base_model=arguments.base_model)
        commands.append([*merge, f"--ja-tokenizer={arguments.ja_tokenizer}"])
    if "conversations" in wanted:
        data = step_command("step4_prepare_data", conversations)
        commands.append([*data, "--max-length=1024"])
    for command in commands:
        if subprocess.run(command, check=False, env=environment()).returncode:
            raise DataError(f"{Path(command[1]).name} failed, which benchmarks start from")
    made = {"demo": DEMO, "tokenizer": tokenizer, "conversations": conversations}
    return vars(arguments) | made


def measure(section: Section, values: Mapping[str, Any]) -> None:
    """Run a benchmark and keep its standard output; its progress goes to the terminal."""
    benchmark = section.benchmark
    quoted = {name: words(value) for name, value in values.items()}
    flags = benchmark.flags.format(**quoted)
    flags += "".join(f" {flag(n)} {quoted[n]}" for n in benchmark.may_use if values[n])
    command = [sys.executable, str(FOLDER / benchmark.script), *shlex.split(flags)]
    start = time.monotonic()
    kept = values["work_dir"] / f"{Path(benchmark.script).stem}.out"
    with open(kept, "w", encoding="utf-8") as file:
        ended = subprocess.run(command, stdout=file, env=environment(), check=False)
    section.minutes = (time.monotonic() - start) / 60
    if ended.returncode:
        section.missing = f"failed with status {ended.returncode}"
        return
    try:
        *said, last = kept.read_text(encoding="utf-8").rstrip().splitlines()
        found = json.loads(last)
        section.ratios, section.versions = found["ratios"], found["versions"]
    except (ValueError, KeyError, TypeError):
        section.missing = f"ended without figures: see {kept.name}"
        return
    section.said = "\n".join(said).strip()


def environment() -> dict[str, str]:
    """Return the environment without the user's profile, since the demo's is measured."""
    return {k: v for k, v in os.environ.items() if not k.startswith("CHATGLM")}


def words(value: Any) -> str:
    """Return the value of an option, quoted for a shell."""
    return shlex.join(map(str, value if isinstance(value, list) else [value]))


# The page


def page(sections: Sequence[Section], command: str, state: str) -> str:
    measured = [section for section in sections if section.said]
    ratios = [
        [ratio["what"], f"**{in_digits(ratio['value'])}**", ratio["aim"]]
        for section in measured
        for ratio in section.ratios
    ]
    parts = [
        "# Benchmarks",
        "Written by `benchmarks/run.py`, which measures all of it in one run; what is not here "
        "could not be measured on this machine. What the figures mean, and what was tried, is in "
        "the documents of their subjects: [experiments.md](experiments.md) lists them.",
        f"```bash\n{command}\n```",
        f"Measured on {machine()}; {datetime.date.today().isoformat()}; {state}.",
        "## Ratios",
        "Both sides of a ratio were measured in the same run, in turn.",
        table(["what", "measured", "aim"], ratios),
        *(part for section in sections for part in described(section)),
        "## Versions",
        table(["", "versions"], versions(measured)),
    ]
    return "\n\n".join(parts) + "\n"


def in_digits(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def described(section: Section) -> list[str]:
    program = f"`benchmarks/{section.benchmark.script}`"
    if section.said:
        return [
            f"## {section.benchmark.title}",
            section.said,
            f"{program}, {section.minutes:.1f} minutes.",
        ]
    return [f"## {section.benchmark.title}", f"{program}: {section.missing or 'to come'}."]


def own_command(arguments: argparse.Namespace) -> str:
    """Return run.py's command line with file names only, since folders differ between machines."""
    parts = ["python benchmarks/run.py --work-dir SCRATCH"]
    for name in ("base_model", "ja_tokenizer"):
        if value := getattr(arguments, name):
            parts.append(f"{flag(name)} {value.name}")
    if arguments.llamafactory:
        interpreter = Path(arguments.llamafactory)
        parts.append(f"--llamafactory {Path(*interpreter.parts[-3:])}")
    if arguments.sources:
        named = [source.partition("=") for source in arguments.sources]
        parts.append("--sources " + " ".join(f"{k}={Path(path).name}" for k, _, path in named))
    if arguments.only:
        parts.append("--only " + " ".join(arguments.only))
    return " \\\n    ".join(parts)


def machine() -> str:
    """Describe the processor, the memory and, if there are any, the GPUs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    text = f"{len(os.sched_getaffinity(0))} cores of {name}, {memory:.0f} GiB of memory"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
        text += "; " + ", ".join(filter(None, gpus))
    return text


def revision() -> str:
    """Return the measured commit, and whether tracked files differ from it."""
    said = []
    for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"]):
        done = subprocess.run(
            ["git", *command], cwd=PROJECT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            return "revision not known"
        said.append(done.stdout.strip())
    commit, changed = said
    return f"revision {commit}" + (" with changes" if changed else "")


def versions(sections: Sequence[Section]) -> list[list[str]]:
    """Return the package versions of this project and of the programs compared with."""
    own = {name: importlib.metadata.version(name) for name in PACKAGES}
    found = {"this project": {"Python": platform.python_version()} | own}
    for section in sections:
        found |= section.versions
    return [[who, ", ".join(f"{k} {v}" for k, v in of.items())] for who, of in found.items()]


if __name__ == "__main__":
    run(main)
