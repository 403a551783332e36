"""Byte-level BPE as a vocabulary: continued BPE against its definition, step 1's files."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from chatglm_ja.bases.byte_level_vocabulary import LEARNED_FILE, ByteLevelVocabulary
from chatglm_ja.bases.tokenizer_json import BaseTokenizer
from chatglm_ja.data import corpus
from chatglm_ja.errors import DataError
from chatglm_ja.vocabulary import learning, merging
from chatglm_ja.vocabulary.policies import Policy
from tests.bases.tiny_tokenizers import SPECIAL, Change, make_byte_level
from tests.conftest import TRAIN_CONFIG, demo_texts

CONFIG = replace(
    TRAIN_CONFIG, method="continue", base_model=Path(), max_piece_length=4, policy=Policy.KANA
)


@pytest.fixture(scope="module")
def auto(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_byte_level(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="module")
def vocabulary(auto: Any) -> ByteLevelVocabulary:
    return ByteLevelVocabulary(BaseTokenizer(auto, [auto.eos_token_id]))


def count_pairs(
    vocabulary: ByteLevelVocabulary, pieces: list[str], lines: Mapping[str, int], policy: Policy
) -> Counter[str]:
    """Count each admitted pair inside the pre-tokenizer's stretches, by the piece it would make.

    The lines are segmented by `tokenizers` with a tokenizer.json made here: each new piece has the
    one merge that its own segmentation shows.
    """
    content = json.loads(json.dumps(vocabulary.backend))
    model = content["model"]
    for piece in pieces:
        parts = [t.value for t in Tokenizer.from_str(json.dumps(content)).model.tokenize(piece)]
        assert len(parts) == 2 and piece not in model["vocab"]
        model["vocab"][piece] = 10_000 + len(model["vocab"])
        model["merges"].append(parts)
    bpe = Tokenizer.from_str(json.dumps(content))
    counts: Counter[tuple[str, str]] = Counter()
    for line, weight in lines.items():
        for stretch, _ in bpe.pre_tokenizer.pre_tokenize_str(line):
            tokens = [token.value for token in bpe.model.tokenize(stretch)]
            for left, right in itertools.pairwise(tokens):
                joined = vocabulary.content_of(left + right)
                text = joined.decode(errors="replace")
                begins_inside = joined[0] & 0xC0 == 0x80
                characters = sum(byte & 0xC0 != 0x80 for byte in joined) + begins_inside
                if (
                    policy.admits(joined)
                    and characters <= CONFIG.max_piece_length
                    and not any(map(str.isdigit, text))
                ):
                    counts[left, right] += weight
    best: Counter[str] = Counter()
    for pair, count in counts.items():
        best["".join(pair)] = max(best["".join(pair)], count)
    return best


@pytest.mark.parametrize("policy", [Policy.KANA, Policy.JAPANESE, Policy.ALL])
def test_every_piece_is_the_most_frequent_pair(
    vocabulary: ByteLevelVocabulary, policy: Policy
) -> None:
    lines = Counter(corpus.training_lines(demo_texts("ja", 3), {}))
    lines.update(["あああああああ", "ーーーーー", *99 * ["１２１は は3は"], "します。", "します。"])
    config = replace(CONFIG, policy=policy)
    merges, characters = learning.learn_pieces(vocabulary, lines, 80, config)
    pieces = ["".join(pair) for pair in merges]
    assert len(pieces) == 80 and characters == []
    texts = [vocabulary.content_of(piece).decode(errors="ignore") for piece in pieces]
    assert not any(character.isdigit() for text in texts for character in text)
    for position in range(0, len(pieces), 9):
        counts = count_pairs(vocabulary, pieces[:position], lines, policy)
        assert counts[pieces[position]] == max(counts.values())


@pytest.mark.parametrize("seed", range(4))
def test_colliding_merges(
    vocabulary: ByteLevelVocabulary, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few characters that share bytes, so that merges overlap; learned until none is left."""
    rng = random.Random(seed)
    lines = Counter(
        {"".join(rng.choices("かきアイ国中 ", k=rng.randint(2, 9))): rng.randint(1, 9)
         for _ in range(12)}
    )  # fmt: skip
    monkeypatch.setattr(learning, "MIN_OCCURRENCES", 1)
    merges, _ = learning.learn_pieces(vocabulary, lines, 500, CONFIG)
    pieces = ["".join(pair) for pair in merges]
    for position in range(0, len(pieces), 5):
        counts = count_pairs(vocabulary, pieces[:position], lines, Policy.KANA)
        assert counts[pieces[position]] == max(counts.values())
    assert not count_pairs(vocabulary, pieces, lines, Policy.KANA)


@pytest.fixture(scope="module")
def learned(vocabulary: ByteLevelVocabulary) -> list[tuple[str, str]]:
    lines = Counter(corpus.training_lines(demo_texts("ja", 100), {}))
    config = replace(CONFIG, max_piece_length=16)
    merges, _ = learning.learn_pieces(vocabulary, lines, 600, config)
    return merges


def test_step_2_drops_no_piece_and_cutting_leaves_reachable_ones(
    vocabulary: ByteLevelVocabulary, learned: list[tuple[str, str]]
) -> None:
    pieces = ["".join(pair) for pair in learned]
    full = merging.merge_pieces(vocabulary, pieces, Policy.KANA)
    assert full.added == pieces and not any(full.dropped.values())
    texts = demo_texts("ja", 30)
    best = merging.merge_pieces(
        vocabulary, pieces, Policy.KANA, max_new_pieces=200, ranking_texts=texts
    )
    assert best.added == [piece for piece in pieces if piece in {*best.added}]
    assert best.vocabulary.segment(best.added) == [[piece] for piece in best.added]

    def tokens(some: list[str]) -> int:
        return sum(map(len, vocabulary.extend(some).encode(texts)))

    # A use is a merge, each of which makes the texts one token shorter.
    uses = merging.count_uses(vocabulary, pieces, texts)
    assert sum(uses.values()) == tokens([]) - tokens(pieces)
    assert tokens(best.added) <= tokens(pieces[:200])


def open_changed(folder: Path, change: Change) -> ByteLevelVocabulary:
    return ByteLevelVocabulary(BaseTokenizer(make_byte_level(folder, change), [0]))


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_pieces_that_are_never_produced_are_dropped(ignore_merges: bool, tmp_path: Path) -> None:
    vocabulary = open_changed(
        tmp_path, lambda content: content["model"].update(ignore_merges=ignore_merges)
    )
    known = next(piece for piece in vocabulary.pieces if piece and len(piece) > 2)
    spelled = {text: spell(vocabulary, text) for text in ("ます", "ま", "す", "ますか", "中国")}
    parts = [spelled["ま"][:2], spelled["ま"], spelled["す"][:2], spelled["す"]]
    pieces = [known, spelled["中国"], spelled["ますか"], *parts, spelled["ます"]]
    merged = merging.merge_pieces(vocabulary, pieces, Policy.JAPANESE)
    assert merged.added == [*parts, spelled["ます"]]
    assert merged.dropped == {
        "already_known": [known],
        "outside_policy": [spelled["中国"]],
        "unspellable": [],
        "unreachable": [spelled["ますか"]],
    }


def test_a_text_is_read_as_pieces_are_made_from_it(tmp_path: Path) -> None:
    """Normalized, no added token, and no space that only a whole text begins with."""

    def change(content: dict[str, Any]) -> None:
        content["normalizer"] = {"type": "NFC"}
        content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True

    vocabulary = open_changed(tmp_path, change)
    assert vocabulary.content_of_text("e\u0301") == "\u00e9".encode()
    text = f"a{SPECIAL[1]}e\u0301"
    ids, sizes, begins = vocabulary.split([text, "", " a"], 1)
    pieces = [vocabulary.pieces[index] for index in ids.tolist()]
    assert None not in pieces
    spelled = b"".join(vocabulary.content_of(piece or "") for piece in pieces)
    assert spelled == vocabulary.content_of_text(text) + b" a"
    assert sizes.tolist() == [len(ids) - 1, 0, 1]
    assert begins[0] and begins[-1] and not begins.all()


def spell(vocabulary: ByteLevelVocabulary, text: str) -> str:
    """Return the bytes of a text as the tokenizer's files write them."""
    (ids,) = vocabulary.encode([text])
    return "".join(vocabulary.pieces[index] or "" for index in ids)


def test_step_1_writes_gpt_2s_merges(
    vocabulary: ByteLevelVocabulary, learned: list[tuple[str, str]], tmp_path: Path
) -> None:
    vocabulary.save_learned(learned, [], tmp_path)
    merges = (tmp_path / LEARNED_FILE).read_text(encoding="utf-8")
    assert merges.startswith("#version: 0.2\n" + " ".join(learned[0]) + "\n")
    pieces = ["".join(pair) for pair in learned]
    assert vocabulary.read_learned(tmp_path) == pieces
    assert vocabulary.read_learned(tmp_path / LEARNED_FILE) == pieces
    rows = (tmp_path / "ja_bpe.vocab").read_text(encoding="utf-8").splitlines()
    readable = [row.split("\t")[0] for row in rows]
    assert len(readable) == len(pieces) and {"ます", "する", "の"} <= {*readable}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x0a\x05<unk>\xff\xfe", "is not UTF-8: expected merges of bytes"),
        (b"", "begins with '', not '#version: 0.2'"),
        ("#version: 0.2\nãģ\n".encode(), "line 2 is 'ãģ': expected merges"),
        ("#version: 0.2\nãģ Ħ x\n".encode(), "line 2 is 'ãģ Ħ x'"),
        ("#version: 0.2\nãģ Ħ\nあ い\n".encode(), "line 3 is 'あ い'"),
        ("#version: 0.2\nãģ Ħ\nã ģĦ\n".encode(), "makes the piece 'ãģĦ' twice"),
    ],
)
def test_files_of_another_kind_are_one_line(
    vocabulary: ByteLevelVocabulary, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / LEARNED_FILE).write_bytes(content)
    with pytest.raises(DataError, match=f"{message}.*pass --method continue"):
        vocabulary.read_learned(tmp_path)
    with pytest.raises(DataError, match="not found: expected merges of bytes"):
        vocabulary.read_learned(tmp_path / "none")
