"""The READMEs name only what exists, and the translations match the English one."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pipeline import PROJECT, STEPS, flags_of

ENGLISH = PROJECT / "README.md"
TRANSLATIONS = ("README.zh-CN.md", "README.ja.md")
# Units, and what the translations write for them.
UNITS = {
    "h": r"h\b|時間|小时",
    "min": r"minutes|min\b|分钟|分",
    "B": r"billion|B\b",
    "M": r"M\b",
    **{unit: rf"{unit}\b" for unit in ("GiB", "GB/s", "GB", "MB", "bytes")},
}
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Section:
    """The language-independent content of a section."""

    level: int
    commands: list[str]
    rows: list[list[Counter[str]]]  # the figures in each cell of its tables
    figures: Counter[str]  # all figures in its text
    code: Counter[str]
    links: Counter[str]


def sections(text: str) -> list[Section]:
    found = []
    # Hide comments in code blocks, which begin a line like headings.
    bare = BLOCK.sub(lambda block: block[0].replace("#", "\0"), text)
    for part in re.split(r"^(?=#+ )", bare, flags=re.MULTILINE)[1:]:
        part = part.replace("\0", "#")
        blocks = [body for _, body in BLOCK.findall(part)]
        prose = BLOCK.sub("", part)
        rows = [line.strip("|").split("|") for line in prose.splitlines() if line.startswith("|")]
        found.append(
            Section(
                level=len(part) - len(part.lstrip("#")),
                commands=[line for body in blocks for line in commands(body)],
                rows=[[figures(cell) for cell in row] for row in rows],
                figures=figures(prose),
                code=Counter(re.findall(r"`([^`]+)`", prose)),
                # Without the links to the other languages.
                links=Counter(re.findall(r"\]\((?!README)([^)]+)\)", prose)),
            )
        )
    return found


def commands(body: str) -> list[str]:
    """Return the lines of a code block without their comments, which follow two spaces."""
    return [re.split(r"  +", line.strip())[0] for line in body.splitlines()]


def figures(text: str) -> Counter[str]:
    """Count the numbers in a text, including digits in names, with the units that follow them."""
    for unit, names in UNITS.items():
        text = re.sub(rf"(?<=\d) ?(?:{names})", f" {unit} ", text)
    return Counter(re.findall(rf"\d+(?:[.,]\d+)*(?: (?:{'|'.join(UNITS)})\b|%)?", text))


@pytest.mark.parametrize("name", TRANSLATIONS)
def test_translations_match_the_english_readme(name: str) -> None:
    expected = sections(ENGLISH.read_text(encoding="utf-8"))
    found = sections((PROJECT / name).read_text(encoding="utf-8"))
    assert [section.level for section in found] == [section.level for section in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.commands == theirs.commands
        assert ours.rows == theirs.rows
        assert ours.code == theirs.code
        assert ours.links == theirs.links
        assert ours.figures == theirs.figures


def test_an_outdated_translation_is_detected() -> None:
    text = ENGLISH.read_text(encoding="utf-8")
    (figure, *_) = re.findall(r"\*\*\d\.\d+\*\*", text)
    for old, new in (
        ("## Licenses", "### Licenses"),
        ("python step7_eval.py --chat", "python step7_eval.py --talk"),
        (figure, "**9.999**"),
        ("38 h ", "38 min "),
        ("`--stall-seconds`", "`--stall-minutes`"),
        ("(docs/scaling.md)", "(docs/data.md)"),
    ):
        assert old in text
        assert sections(text.replace(old, new)) != sections(text), old


def test_the_example_of_own_data_keeps_the_results_of_the_demo() -> None:
    blocks = (body for _, body in BLOCK.findall(ENGLISH.read_text(encoding="utf-8")))
    (example,) = (body for body in blocks if "step1_train_tokenizer.py --sources" in body)
    root, _, rest = example.partition("\n")
    assert re.fullmatch("export CHATGLM_JA_ARTIFACTS=artifacts/[a-z_]+", root)
    # Every result that the example reads is made by it.
    made = re.findall(r"^python (\S+)\.py", rest, flags=re.MULTILINE)
    assert made == [
        "demo/build_base_model", "step1_train_tokenizer", "step2_merge_tokenizer",
        "step4_prepare_data",
    ]  # fmt: skip


def documents() -> list[Path]:
    return [*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_every_link_leads_to_a_file(path: Path) -> None:
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_every_command_exists(path: Path) -> None:
    blocks = "\n".join(body for _, body in BLOCK.findall(path.read_text(encoding="utf-8")))
    scripts = set(re.findall(r"\b(?:python|bash|sbatch) ([\w/.]+\.(?:py|sh|sbatch))", blocks))
    for script in scripts:
        assert (PROJECT / script).is_file(), script
        if not script.endswith(".py"):
            subprocess.run(["bash", "-n", str(PROJECT / script)], check=True)
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", blocks, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    if path == ENGLISH:
        assert scripts >= set(STEPS)


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_every_module_that_a_document_names_exists(path: Path) -> None:
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    for name in re.findall(r"`((?:\w+/)+\w+\.(?:py|sh))`", text):
        assert (PROJECT / name).is_file() or (PROJECT / "chatglm_ja" / name).is_file(), name


def test_the_design_names_every_module() -> None:
    package = PROJECT / "chatglm_ja"
    text = (PROJECT / "docs" / "design.md").read_text(encoding="utf-8")
    block = next(body for _, body in BLOCK.findall(text) if "storage/\n" in body)
    listed, room = set(), ""
    for line in block.splitlines():
        if line.endswith("/"):
            room = line
        elif match := re.match(r" *(\w+\.py) ", line):
            listed.add(room + match[1] if line.startswith(" ") else match[1])
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    assert listed == {name for name in modules if not name.endswith("__init__.py")}


def documented_flags(program: str) -> set[str]:
    """Return the flags that the documents pass to a program in commands, wherever they stand."""
    launcher = program.replace(".py", "_multi_gpu.sh")
    command = re.compile(rf"(?:python|bash) (?:{program}|{launcher})([^\n`#]*)")
    texts = [path.read_text(encoding="utf-8").replace("\\\n", " ") for path in documents()]
    lines = [line for text in texts for line in command.findall(text)]
    return {flag for line in lines for flag in re.findall(r"--[\w-]+", line)}


PROGRAMS = [*STEPS, *(f"benchmarks/{path.name}" for path in (PROJECT / "benchmarks").glob("*.py"))]
DOCUMENTED = [program for program in PROGRAMS if documented_flags(program)]


def test_most_programs_are_documented_with_flags() -> None:
    assert len(DOCUMENTED) > len(PROGRAMS) / 2


@pytest.mark.parametrize("program", DOCUMENTED)
def test_every_flag_that_a_document_gives_a_program_exists(program: str) -> None:
    assert documented_flags(program) <= flags_of(program)
