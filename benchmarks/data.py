"""Measure step 4's speed and memory, from texts to packed blocks on disk, against other programs.

Texts that step 4's filters would drop are removed beforehand, so that all programs do the same
work. Each program runs in its own process, bound to one core, in turn, --repeats times. The output
shows medians in MB of UTF-8 text per second, and the ratio to bare sentencepiece:

    sentencepiece          encode() on all texts, held in memory; the ids are discarded
    tokenizers             encode_batch() on the same texts, with tokenizer.json
    step 4, no near dup.   .jsonl files to shards: read, clean, filter, tokenize, deduplicate
                           exactly, mix, pack, write; one process
    step 4                 the same with the near-duplicate search, which is the default
    LLaMA-Factory          its own preprocessing of the same files, if --llamafactory names its
                           interpreter; benchmarks/llamafactory_data.py says how to install it

    python benchmarks/data.py --tokenizer STEP2_DIR --memory-gb 1 \\
        --llamafactory lf/bin/python --sources ja=ja.jsonl zh=zh.jsonl en=en.jsonl

--memory-gb N generates N GB of text from randomly drawn lines of the sources and measures the peak
memory of step 4's processes on it.

--edited-documents N edits N documents of each language in several ways, and shows how many of the
copies the near-duplicate search finds among them. Similarities are computed from the sets of
5-grams, and characters are folded by Python, both without the code that is measured.
--search-millions N ... searches N million random signatures, of which a tenth are copies with 95%
of their entries equal to another one's, and a tenth with 50%. It shows CPU seconds and memory.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

# In this folder; importing it makes the project's package importable.
import measuring
import numpy as np
from measuring import PROJECT, Ratio
from tokenizers import Tokenizer
from tqdm import tqdm

from chatglm_ja.chatglm3 import tokenizer
from chatglm_ja.cli import run
from chatglm_ja.data import dedup, filters, language_id, near_duplicates, prepare_texts, token_store
from chatglm_ja.data.cleaning import Fate
from chatglm_ja.data.settings import PrepareDataConfig
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.settings import CORES
from chatglm_ja.sources import Source

BLOCK_SIZE = 1024
DOCUMENT_LINES = 40

BARE = "sentencepiece"
STEP = "step 4"
NO_NEAR = "step 4, no near dup."
LLAMAFACTORY = "LLaMA-Factory"

FULL_WIDTH: dict[int, int] = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
# What is written in half width is written in full width, and the other way round.
OTHER_WIDTH = FULL_WIDTH | {wide: code for code, wide in FULL_WIDTH.items()}
OTHER_WIDTH |= str.maketrans("。、「」 　", "｡､｢｣　 ")
SEARCH_CHUNK = 2500  # documents of 8 MB of text
THRESHOLD = PrepareDataConfig.near_duplicates
UNLIKE = 0.6  # documents of a larger similarity may be near-duplicates
SEARCH_RUNS = 3


def settings(folder: Path, sources: list[Source], **changes: Any) -> PrepareDataConfig:
    """Return step 4's defaults; conversations are not part of the benchmark."""
    languages = dict.fromkeys(source.language for source in sources)
    return PrepareDataConfig(
        output_dir=Path("unused"),
        tokenizer=folder,
        sources=tuple(sources),
        shares=tuple(f"{language}=1" for language in languages),
        total_tokens=1,
        sft_sources=(Source("ja", "unused"),),
        sft_shares=("ja=1",),
        sft_examples=1,
        block_size=BLOCK_SIZE,
        **changes,
    )


def source_folders(output: Path, config: PrepareDataConfig) -> list[Path]:
    folders = [output / f"texts-{number}" for number in range(len(config.sources))]
    for folder in folders:
        folder.mkdir(parents=True)
    return folders


def prepare(config: PrepareDataConfig, output: Path) -> int:
    """Turn all texts into shards, in their own proportions; return the number of tokens."""
    index = prepare_texts.prepare(config, source_folders(output, config))
    tokens = {source.language: 0 for source in config.sources}
    for number, source in enumerate(config.sources):
        tokens[source.language] += int(index.length[index.source == number].sum())
    # Fill blocks for all tokens: repeats replace duplicates and validation documents.
    config = dataclasses.replace(config, total_tokens=sum(tokens.values()))
    counts, _ = prepare_texts.write(index, config, tokens, output)
    return sum(counts["train_tokens"].values())


def measure(way: str, folder: Path, sources: list[Source]) -> dict[str, Any]:
    """Run one of the programs in this process; return its seconds and its number of tokens."""
    work: Callable[[], Any]
    if way in (STEP, NO_NEAR):
        near = {"near_duplicates": 0.0} if way == NO_NEAR else {}
        config = settings(folder, sources, num_processes=1, **near)
        # Loading the tokenizer and the libraries is not measured, as for the other programs.
        token_store.load_tokenizer(folder)
        import datasets  # noqa: F401

        output = Path(tempfile.mkdtemp(dir=os.environ["BENCHMARK_DIR"]))

        def work() -> int:
            return prepare(config, output)

    else:
        texts = [text for source in sources for text in SourceReader().texts(source)]
        if way == BARE:
            processor = tokenizer.load_processor(folder)

            def work() -> int:
                return sum(len(processor.encode(text)) for text in texts)

        else:
            fast = Tokenizer.from_file(str(folder / "tokenizer.json"))

            def work() -> int:
                starts = range(0, len(texts), 100)
                batches = (
                    fast.encode_batch(texts[start : start + 100], add_special_tokens=False)
                    for start in starts
                )
                return sum(len(encoding) for batch in batches for encoding in batch)

    start = time.perf_counter()
    tokens = work()
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def in_own_process(command: list[str], core: int | None, work_dir: Path) -> dict[str, Any]:
    """Run a program, bound to `core` unless it is None; return its last line of output as JSON."""
    environment = os.environ | {"BENCHMARK_DIR": str(work_dir), "TOKENIZERS_PARALLELISM": "false"}
    bind = None if core is None else lambda: os.sched_setaffinity(0, {core})
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, preexec_fn=bind
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def without_dropped(sources: list[Source], folder: Path) -> list[Source]:
    """Write .jsonl copies of the sources without the texts that a filter drops; return them."""
    made = []
    for number, source in enumerate(sources):
        texts = list(SourceReader().texts(source))
        codes = language_id.code_points(texts)
        fates = filters.apply_filters(texts, codes, source, 32)
        path = folder / f"{number}_{source.language}.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for text, fate in zip(SourceReader().texts(source), fates, strict=True):
                if fate is Fate.KEPT:
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        made.append(Source(source.language, str(path)))
    return made


def make_text(sources: list[Source], size: int, folder: Path) -> list[Source]:
    """Write `size` bytes of randomly drawn lines to files, in the sources' proportions."""
    rng = random.Random(0)
    texts = {k: list(group) for k, group in SourceReader().texts_by_language(sources).items()}
    total = sum(len(text.encode()) for group in texts.values() for text in group)
    made = []
    for language, group in texts.items():
        lines = [line for text in group for line in text.split("\n") if line.strip()]
        left = int(size * sum(len(text.encode()) for text in group) / total)
        path = folder / f"{language}.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            while left > 0:
                text = "\n".join(rng.choices(lines, k=DOCUMENT_LINES))
                left -= len(text.encode())
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        made.append(Source(language, str(path)))
    return made


def peak_memory(folder: Path, sources: list[Source], output: Path) -> dict[str, Any]:
    """Run step 4 on all cores; return seconds, tokens and the peak resident memory.

    The memory is that of this process and its children together, sampled ten times a second.
    """
    peak = 0
    finished = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not finished.wait(0.1):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    tokens = prepare(settings(folder, sources), output)
    seconds = time.perf_counter() - start
    finished.set()
    watcher.join()
    return {"seconds": seconds, "tokens": tokens, "peak_gb": peak / 1e9}


def resident_bytes() -> int:
    """Return the resident bytes of this process and its children; shared pages count for each."""
    children = Path("/proc/self/task").glob("*/children")
    pids = ["self", *(pid for file in children for pid in file.read_text().split())]
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return total * os.sysconf("SC_PAGE_SIZE")


def speed_table(arguments: argparse.Namespace, sources: list[Source]) -> list[Ratio]:
    size = sum(len(text.encode()) for s in sources for text in SourceReader().texts(s)) / 1e6
    own = [sys.executable, __file__, "--tokenizer", str(arguments.tokenizer)]
    own += ["--sources", *map(str, sources), "--way"]
    ways = [BARE, "tokenizers", NO_NEAR, STEP]
    if arguments.llamafactory:
        ways.append(LLAMAFACTORY)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in tqdm(range(arguments.repeats), desc="rounds"):
        for way in ways:
            with tempfile.TemporaryDirectory(dir=arguments.work_dir) as name:
                command = [*own, way]
                if way == LLAMAFACTORY:
                    script = PROJECT / "benchmarks" / "llamafactory_data.py"
                    command = [arguments.llamafactory, str(script), "--output-dir", f"{name}/out"]
                    command += ["--tokenizer", str(arguments.tokenizer), "--files"]
                    command += [source.path for source in sources]
                seconds[way].append(in_own_process(command, 0, Path(name))["seconds"])
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    print(f"{size:.1f} MB of text, one core, medians of {arguments.repeats} runs\n")
    rows = []
    for way, median in medians.items():
        low, high = size / max(seconds[way]), size / min(seconds[way])
        to_bare = medians[BARE] / median
        rows.append([way, f"{size / median:.2f}", f"{to_bare:.2f}", f"{low:.2f} to {high:.2f}"])
    head = ["way", "MB/s", "of bare sentencepiece", "lowest and highest MB/s"]
    print(measuring.table(head, rows))
    others = [way for way in ways if way not in (STEP, NO_NEAR)]
    return [
        Ratio(f"{way}, MB/s, to {other}", medians[other] / medians[way])
        for way in (STEP, NO_NEAR)
        for other in others
    ]


def memory_line(arguments: argparse.Namespace, sources: list[Source]) -> Ratio:
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as name:
        made = make_text(sources, int(arguments.memory_gb * 1e9), Path(name))
        command = [sys.executable, __file__, "--tokenizer", str(arguments.tokenizer)]
        command += ["--sources", *map(str, made), "--way", "memory"]
        found = in_own_process(command, None, Path(name))
    rate = arguments.memory_gb * 1e3 / found["seconds"]
    print(
        f"\n{arguments.memory_gb:g} GB of text, {CORES} processes: {found['seconds']:.0f} s "
        f"({rate:.1f} MB/s), {found['tokens']:,} tokens, peak memory of all processes together "
        f"{found['peak_gb']:.2f} GB"
    )
    return Ratio(
        f"peak memory of step 4's {CORES} processes, to the {arguments.memory_gb:g} GB of text",
        found["peak_gb"] / arguments.memory_gb,
    )


def change_characters(share: float) -> Callable[[random.Random, str], str]:
    """Return an edit that replaces a share of a text's characters by others of the same text."""

    def change(rng: random.Random, text: str) -> str:
        characters = list(text)
        for place in rng.sample(range(len(text)), round(share * len(text))):
            characters[place] = rng.choice(text)
        return "".join(characters)

    return change


EDITS: dict[str, Callable[[random.Random, str], str]] = {
    "lines joined": lambda _, text: " ".join(text.split()),
    "a line break after every 20 characters": lambda _, text: "\n".join(
        text[start : start + 20] for start in range(0, len(text), 20)
    ),
    "punctuation removed": lambda _, text: "".join(
        c for c in text if c.isspace() or unicodedata.category(c)[0] not in "PS"
    ),
    "punctuation in the other width": lambda _, text: "".join(
        c if c.isalnum() else c.translate(OTHER_WIDTH) for c in text
    ),
    "all characters in the other width": lambda _, text: text.translate(OTHER_WIDTH),
    "upper case": lambda _, text: text.upper(),
    **{
        f"{percent:g}% of the characters changed": change_characters(percent / 100)
        for percent in (0.5, 1, 2, 5, 10, 20)
    },
    "the last tenth cut off": lambda _, text: text[: len(text) * 9 // 10],
    "the last half cut off": lambda _, text: text[: len(text) // 2],
}


def shingles(text: str) -> set[str]:
    """Return the set whose similarities the search estimates."""
    normal = unicodedata.normalize("NFKC", text).casefold()
    letters = "".join(character for character in normal if character.isalnum())
    size = near_duplicates.SHINGLE_CHARACTERS
    return {letters[start : start + size] for start in range(max(1, len(letters) - size + 1))}


def similarity(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def search(signatures: np.ndarray, folder: Path) -> np.ndarray:
    """Return which texts are near-duplicates of an earlier one; signatures [texts, NUM_HASHES]."""
    path = folder / "signatures"
    np.ascontiguousarray(signatures.T).tofile(path)
    chosen = np.packbits(np.ones(len(signatures), dtype=bool))
    files = near_duplicates.SignatureFiles([path], [len(signatures)], chosen)
    return near_duplicates.find_near_duplicates(files, THRESHOLD, 1, folder / "pairs")


def edit_table(sources: list[Source], count: int, folder: Path) -> None:
    """Print how many edited copies of documents are found, and how many other documents."""
    rng = random.Random(0)
    originals: list[tuple[str, set[str]]] = []
    for texts in map(list, SourceReader().texts_by_language(sources).values()):
        rng.shuffle(texts)
        group: list[tuple[str, set[str]]] = []
        for text in texts:
            grams = shingles(text)
            if len(group) < count and all(similarity(grams, g) < UNLIKE for _, g in group):
                group.append((text, grams))
        originals += group

    def sign(texts: list[str]) -> np.ndarray:
        return near_duplicates.minhash_signatures(texts)

    signatures = sign([text for text, _ in originals])
    rows, false = [], 0
    for name, edit in EDITS.items():
        copies = [edit(rng, text) for text, _ in originals]
        exact = np.array(
            [similarity(shingles(copy), g) for copy, (_, g) in zip(copies, originals, strict=True)]
        )
        near = search(np.concatenate([signatures, sign(copies)]), folder)
        false += int(near[: len(originals)].sum())
        rows.append(
            [name, f"{exact.mean():.3f}", f"{(exact >= THRESHOLD).mean():.1%}",
             f"{near[len(originals) :].mean():.1%}"]
        )  # fmt: skip
    print(f"\n{len(originals):,} documents and a copy of each; similarity {THRESHOLD:g}\n")
    head = ["copies", "mean similarity", f"of at least {THRESHOLD:g}", "found"]
    print(measuring.table(head, rows))
    print(
        f"\nOf {len(originals) * len(EDITS):,} searched documents that are no copies, {false} "
        "were found"
    )


def random_hashes(numbers: np.ndarray) -> np.ndarray:
    """Return the entries of signatures of numbered documents, uint32 [NUM_HASHES, documents]."""
    entries = np.arange(near_duplicates.NUM_HASHES, dtype=np.uint64)[:, None]
    hashes = numbers.astype(np.uint64) + (entries << np.uint64(40))
    for shift in (31, 29, 32):
        hashes *= dedup.MULTIPLIER
        hashes ^= hashes >> np.uint64(shift)
    return hashes.astype(np.uint32)


def search_random(count: int, folder: Path) -> dict[str, Any]:
    """Search `count` signatures; of ten, two resemble one that does not resemble another."""
    paths, sizes = [], []
    for start in range(0, count, SEARCH_CHUNK):
        rng = np.random.default_rng(start)
        numbers = np.arange(start, min(start + SEARCH_CHUNK, count))
        signatures = random_hashes(numbers)
        for kind, equal in ((8, 0.95), (9, 0.5)):
            copies = numbers % 10 == kind
            others = (rng.random(int(copies.sum())) * (numbers[copies] // 10)).astype(int) * 10
            same = rng.random((near_duplicates.NUM_HASHES, len(others))) < equal
            signatures[:, copies] = np.where(same, random_hashes(others), signatures[:, copies])
        paths.append(folder / f"{start}.hashes")
        signatures.tofile(paths[-1])
        sizes.append(len(numbers))
    files = near_duplicates.SignatureFiles(paths, sizes, np.packbits(np.ones(count, dtype=bool)))
    before = resource.getrusage(resource.RUSAGE_SELF)
    near = near_duplicates.find_near_duplicates(files, THRESHOLD, 1, folder / "pairs")
    after = resource.getrusage(resource.RUSAGE_SELF)
    is_right = (near == (np.arange(count) % 10 == 8)).all()
    return {
        "user": after.ru_utime - before.ru_utime, "system": after.ru_stime - before.ru_stime,
        "disk_gb": (after.ru_inblock - before.ru_inblock) * 512 / 1e9,
        "peak_gb": after.ru_maxrss / 1e6, "right": bool(is_right),
    }  # fmt: skip


def search_table(arguments: argparse.Namespace) -> list[Ratio]:
    rows, seconds = [], {}
    for millions in arguments.search_millions:
        command = [sys.executable, __file__, "--tokenizer=-", "--sources=-", "--way=search"]
        command += ["--search-millions", str(millions)]
        runs = []
        for _ in range(SEARCH_RUNS):
            with tempfile.TemporaryDirectory(dir=arguments.work_dir) as name:
                runs.append(in_own_process(command, 0, Path(name)))
        best = min(runs, key=lambda run: run["user"] + run["system"])
        each = {kind: best[kind] / millions for kind in ("user", "system")}
        seconds[millions] = sum(each.values())
        rows.append(
            [f"{millions:g}", f"{seconds[millions]:.2f}", f"{each['user']:.2f}",
             f"{each['system']:.2f}", f"{best['disk_gb']:.1f}",
             f"{best['peak_gb']:.2f}", "yes" if best["right"] else "no"]
        )  # fmt: skip
    print(f"\nNear-duplicate search, one process, least of {SEARCH_RUNS} runs\n")
    head = ["million documents", "CPU s per million", "of which user", "system",
            "read from disk, GB", "peak memory, GB", "found exactly the copies"]  # fmt: skip
    print(measuring.table(head, rows))
    first, last = min(seconds), max(seconds)
    what = f"CPU time of the search per document, of {last:g} million to {first:g} million"
    return [Ratio(what, seconds[last] / seconds[first], "below 1.2")]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="output folder of step 2")
    parser.add_argument("--sources", nargs="+", required=True, metavar="LANGUAGE=FILE.jsonl")
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs per program (default: 5; 0: none)"
    )
    parser.add_argument("--llamafactory", help="Python interpreter of its environment")
    parser.add_argument(
        "--memory-gb",
        type=float,
        default=0.0,
        help="GB of text for the memory measurement (default: none)",
    )
    parser.add_argument(
        "--edited-documents",
        type=int,
        default=0,
        help="documents of each language to edit for the near-duplicate search (default: none)",
    )
    parser.add_argument(
        "--search-millions",
        nargs="+",
        type=float,
        default=[],
        help="millions of documents to search for near-duplicates; 0.5 GB of disk each",
    )
    parser.add_argument("--work-dir", type=Path, help="folder for temporary files")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.way == "search":
        count = int(arguments.search_millions[0] * 1e6)
        print(json.dumps(search_random(count, Path(os.environ["BENCHMARK_DIR"]))))
        return
    sources = [Source.parse(spec) for spec in arguments.sources]
    if arguments.way == "memory":
        output = Path(os.environ["BENCHMARK_DIR"]) / "out"
        print(json.dumps(peak_memory(arguments.tokenizer, sources, output)))
    elif arguments.way:
        print(json.dumps(measure(arguments.way, arguments.tokenizer, sources)))
    else:
        with tempfile.TemporaryDirectory(dir=arguments.work_dir) as name:
            usable = without_dropped(sources, Path(name))
            ratios = speed_table(arguments, usable) if arguments.repeats else []
            if arguments.edited_documents:
                edit_table(usable, arguments.edited_documents, Path(name))
        if arguments.memory_gb:
            ratios.append(memory_line(arguments, sources))
        if arguments.search_millions:
            ratios += search_table(arguments)
        measuring.conclude(ratios)


if __name__ == "__main__":
    run(main)
