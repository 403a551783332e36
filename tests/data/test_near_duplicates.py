"""Near-duplicates: which differences count, estimated similarities, linked texts, the search."""

import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatglm_ja.data import near_duplicates
from chatglm_ja.data.near_duplicates import BAND_SIZE, NUM_HASHES, SignatureFiles
from chatglm_ja.errors import DataError


def sign(texts: Sequence[str]) -> np.ndarray:
    return near_duplicates.minhash_signatures(texts)


def shingles(text: str) -> set[str]:
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def random_text(rng: random.Random, size: int) -> str:
    return "".join(chr(rng.randrange(0x3041, 0x3090)) for _ in range(size))


def altered(rng: random.Random, text: str, changes: int) -> str:
    characters = list(text)
    for place in rng.sample(range(len(text)), changes):
        characters[place] = "漢"
    return "".join(characters)


def folded(texts: Sequence[str]) -> list[str]:
    codes, sizes = near_duplicates.fold_texts(texts)
    whole = codes.astype("<u4").tobytes().decode("utf-32-le")
    ends = np.cumsum(sizes).tolist()
    return [whole[end - size : end] for size, end in zip(sizes.tolist(), ends, strict=True)]


def folded_one_by_one(text: str) -> str:
    normal = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in normal if character.isalnum())


CHARACTERS = [chr(code) for code in range(1, 0x110000) if not 0xD800 <= code < 0xE000]


@pytest.mark.parametrize("form", ["abcdeか{}fg", "ABCDE{}", "{}あいうえおe"])
def test_every_character_is_folded_as_unicode_says(form: str) -> None:
    texts = [form.format(character) for character in CHARACTERS]
    assert folded(texts) == [folded_one_by_one(text) for text in texts]


def test_neighbors_are_composed_as_unicode_says() -> None:
    """Half-width kana, jamo and marks: what they become depends on the character before."""
    rng = random.Random(0)
    special = [
        character
        for character in CHARACTERS
        if unicodedata.normalize("NFKC", character) != character
        or unicodedata.category(character)[0] == "M"
        or 0x1100 <= ord(character) < 0x1200
    ]
    for pool in (special, [chr(code) for code in range(0xFF00, 0xFFDD)], CHARACTERS[:0x2000]):
        texts = ["abcde" + "".join(rng.choices(pool, k=rng.randrange(1, 9))) for _ in range(9000)]
        assert folded(texts) == [folded_one_by_one(text) for text in texts]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("データを保存します。\n次に、閉じます。", "データを保存します。次に,閉じます."),
        ("ABC株式会社（東京）：１２３", "abc 株式会社 (東京): 123"),
        ("ｶﾞｲﾄﾞとデータ", "ガイドとデータ"),
        ("Straße № 12, ½ ㎡", "STRASSE NO 12 1/2 M2"),
        ("Press “Save As…” now", "press\t'save as...' NOW!"),
    ],
)
def test_layout_punctuation_width_and_case_make_no_difference(text: str, same: str) -> None:
    first, second, other = sign([text, same, text.replace("a", "b").replace("デ", "テ") + "other"])
    assert (first == second).all()
    assert not (first == other).all()


def test_texts_without_letters_are_compared_as_they_are() -> None:
    symbols = ["★☆" * 20, "＊＊＊" * 20, "(^_^)" * 20, "* a *" * 4, "* b *" * 4]
    signatures = sign(symbols)
    for number, signature in enumerate(signatures):
        equal = (signatures == signature).mean(axis=1)
        assert equal[number] == 1 and (np.delete(equal, number) < 0.8).all()
    assert folded(["a.b", "★"]) == ["a.b", "★"]


def test_signatures_estimate_the_similarity_of_sets() -> None:
    rng = random.Random(0)
    base = random_text(rng, 1500)
    texts = [base, *(altered(rng, base, n) for n in (0, 5, 20, 60, 150)), random_text(rng, 1500)]
    sets = [shingles(folded_one_by_one(text)) for text in texts]
    signatures = sign(texts)
    for own, signature in zip(sets, signatures, strict=True):
        true = len(sets[0] & own) / len(sets[0] | own)
        assert np.mean(signature == signatures[0]) == pytest.approx(true, abs=0.13)  # 3 deviations


def test_a_signature_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    texts = [
        "あ",
        "ab",
        "abcd",
        "Abcde",
        random_text(rng, 300),
        "あ",
        "ａｂｃｄｅｆ",
        "ﾊﾟ!",
        "ßabcde",
    ]
    together = sign(texts)
    for text, signature in zip(texts, together, strict=True):
        assert (sign([text])[0] == signature).all()
    assert (together[0] == together[5]).all()
    assert not (together[0] == together[1]).all()
    assert sign([]).shape == (0, NUM_HASHES)
    monkeypatch.setattr(near_duplicates, "CHARACTERS_AT_ONCE", 8)
    assert (sign(texts) == together).all()


def write_files(folder: Path, signatures: np.ndarray, sizes: Sequence[int]) -> list[Path]:
    """Write signatures [documents, NUM_HASHES] as files of these many documents."""
    paths = [folder / f"{number}.hashes" for number in range(len(sizes))]
    parts = np.split(signatures, np.cumsum(sizes)[:-1])
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(np.ascontiguousarray(part.T.astype("<u4")).tobytes())
    return paths


def search(
    folder: Path,
    signatures: np.ndarray,
    sizes: Sequence[int] = (),
    chosen: np.ndarray | None = None,
    threshold: float = 0.8,
    processes: int = 1,
) -> list[bool]:
    sizes = sizes or [len(signatures)]
    chosen = np.ones(len(signatures), dtype=bool) if chosen is None else chosen
    paths = write_files(folder, signatures, sizes)
    files = SignatureFiles(paths, sizes, np.packbits(chosen))
    scratch = folder / "scratch.part"
    near = near_duplicates.find_near_duplicates(files, threshold, processes, scratch)
    assert not scratch.exists()
    return near.tolist()


def compare_all(signatures: np.ndarray, threshold: float) -> list[bool]:
    """Compare every signature with every earlier one; a text that is linked to one is near."""
    groups = list(range(len(signatures)))
    for later in range(len(signatures)):
        for earlier in range(later):
            if np.mean(signatures[earlier] == signatures[later]) >= threshold:
                one, other = sorted((groups[earlier], groups[later]))
                groups = [one if group == other else group for group in groups]
    return [group != number for number, group in enumerate(groups)]


def random_signatures(seed: int, count: int) -> np.ndarray:
    """Signatures of which half resemble an earlier one, with similarities from 0.5 to 1."""
    rng = np.random.default_rng(seed)
    signatures = rng.integers(0, 2**32, (count, NUM_HASHES), dtype=np.uint32)
    for number in range(1, count):
        if rng.random() < 0.5:
            same = rng.random(NUM_HASHES) < rng.uniform(0.5, 1)
            signatures[number, same] = signatures[rng.integers(number), same]
    return signatures


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_what_comparing_all_signatures_finds(seed: int, tmp_path: Path) -> None:
    signatures = random_signatures(seed, 300)
    expected = compare_all(signatures, 0.8)
    assert 30 < sum(expected) < 120
    assert search(tmp_path, signatures) == expected
    assert search(tmp_path, signatures, [0, 100, 0, 199, 1, 0]) == expected


def test_every_band_finds_pairs(tmp_path: Path) -> None:
    """Of 32 pairs of texts, each agrees in another band and in nothing else."""
    rng = np.random.default_rng(10)
    signatures = rng.integers(0, 2**32, (64, NUM_HASHES), dtype=np.uint32)
    for band in range(32):
        entries = slice(band * BAND_SIZE, (band + 1) * BAND_SIZE)
        signatures[band + 32, entries] = signatures[band, entries]
    expected = [False] * 32 + [True] * 32
    assert search(tmp_path, signatures, threshold=BAND_SIZE / NUM_HASHES) == expected


def test_documents_that_are_not_chosen_do_not_exist(tmp_path: Path) -> None:
    signatures = random_signatures(3, 300)
    chosen = np.random.default_rng(0).random(300) < 0.7
    expected = compare_all(signatures[chosen], 0.8)
    assert search(tmp_path, signatures, [100] * 3, chosen) == expected
    assert search(tmp_path, signatures, [100] * 3, np.zeros(300, dtype=bool)) == []


def test_parts_and_processes_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signatures = random_signatures(4, 300)
    expected = compare_all(signatures, 0.8)
    for name in ("DOCUMENTS_AT_ONCE", "PAIRS_AT_ONCE", "DOCUMENTS_PER_PROCESS"):
        monkeypatch.setattr(near_duplicates, name, 7)
    for processes in (1, 2):
        assert search(tmp_path, signatures, [3] * 100, processes=processes) == expected


def test_equal_hashes_of_different_bands_make_no_near_duplicates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key's hash is cut short to make room for the document's number; here to nothing."""
    monkeypatch.setattr(near_duplicates, "row_hashes", lambda rows: np.zeros(len(rows), np.uint64))
    signatures = np.random.default_rng(5).integers(0, 2**32, (50, NUM_HASHES), dtype=np.uint32)
    signatures[20] = signatures[19]
    assert np.flatnonzero(search(tmp_path, signatures)).tolist() == [20]


def test_the_threshold_is_a_share_of_equal_entries(tmp_path: Path) -> None:
    signatures = np.random.default_rng(6).integers(0, 2**32, (2, NUM_HASHES), dtype=np.uint32)
    for equal in (102, 103):  # of 128; 0.8 is 102.4
        signatures[1, :equal] = signatures[0, :equal]
        assert search(tmp_path, signatures) == [False, equal == 103]


def test_near_duplicates_are_those_above_the_threshold(tmp_path: Path) -> None:
    rng = random.Random(2)
    originals = [random_text(rng, 800) for _ in range(60)]
    near = [altered(rng, text, 4) for text in originals]  # similarity 0.95
    far = [altered(rng, text, 80) for text in originals]  # similarity 0.45
    expected = [False] * 60 + [True] * 60 + [False] * 60
    assert search(tmp_path, sign([*originals, *near, *far])) == expected


def test_the_first_of_linked_texts_stays(tmp_path: Path) -> None:
    rng = random.Random(3)
    chain = [random_text(rng, 1000)]
    for _ in range(5):
        chain.append(altered(rng, chain[-1], 8))
    order = [3, 0, 5, 1, 4, 2]
    assert search(tmp_path, sign([chain[i] for i in order])) == [False, *[True] * 5]


def test_a_file_is_read_twice_for_each_band_however_many_pairs_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_entries = near_duplicates._read_entries
    counts: list[int] = []

    def counted(path: Path, start: int, count: int) -> Any:
        counts.append(count)
        return read_entries(path, start, count)

    monkeypatch.setattr(near_duplicates, "_read_entries", counted)
    monkeypatch.setattr(near_duplicates, "PAIRS_AT_ONCE", 7)
    search(tmp_path, random_signatures(7, 300), [60] * 5)
    assert counts == [60 * BAND_SIZE] * (5 * 2 * near_duplicates.BANDS)


def test_too_many_documents_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MAX_DOCUMENTS", 4)
    signatures = random_signatures(8, 5)
    chosen = np.array([True] * 4 + [False])
    assert search(tmp_path, signatures, chosen=chosen) == compare_all(signatures[:4], 0.8)
    with pytest.raises(DataError, match="at most 4 documents, found 5: pass --near-duplicates 0"):
        search(tmp_path, signatures)


def test_pairs_hold_the_largest_numbers() -> None:
    last = np.array([near_duplicates.MAX_DOCUMENTS - 1], dtype=np.uint64)
    earlier, later = near_duplicates._split(near_duplicates._join(last - np.uint64(1), last))
    assert (int(earlier[0]), int(later[0])) == (2**32 - 2, 2**32 - 1)


def test_a_short_file_is_an_error(tmp_path: Path) -> None:
    signatures = random_signatures(9, 5)
    (path,) = write_files(tmp_path, signatures, [5])
    path.write_bytes(path.read_bytes()[:-1])
    files = SignatureFiles([path], [5], np.packbits(np.ones(5, dtype=bool)))
    with pytest.raises(DataError, match=r"0.hashes is too short: remove its folder"):
        near_duplicates.find_near_duplicates(files, 0.8, 1, tmp_path / "scratch.part")
