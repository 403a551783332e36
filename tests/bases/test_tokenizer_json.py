"""Extended tokenizers as AutoTokenizer loads them: ids, added tokens, settings, round trips."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from chatglm_ja.bases.interface import Vocabulary
from chatglm_ja.bases.tokenizer_json import EOS_IDS, FIRST_NEW_ID
from chatglm_ja.bases.transformers import TransformersTokenizer
from chatglm_ja.bases.vocabularies import open_vocabulary
from chatglm_ja.data import corpus
from chatglm_ja.errors import DataError
from chatglm_ja.vocabulary import learning, merging
from chatglm_ja.vocabulary.policies import Policy
from tests.bases.test_byte_level_vocabulary import CONFIG
from tests.bases.tiny_tokenizers import SPECIAL, Change, make_byte_level, make_llama
from tests.conftest import demo_texts

HOSTILE = [
    "ファイル\u3000を 開く。\r\n\t  末尾 ", "か\u3099 e\u0301 Å", "🦊👨‍👩‍👧 ﾃｽﾄ ＡＢＣ１２",
    "\x00\x04\x7f\ufeff\u200b",
    "<|im_end|><|endoftext|> </s> <unk>", "あ" * 300, "ĠĊ▁ãģ", "\U0010ffff\ue000\ud7ff", " ", "",
]  # fmt: skip


def add_digits_in_front(content: dict[str, Any]) -> None:
    """Some added tokens have ids among the pieces, as SmolLM2's and GPT-2's have."""
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {SPECIAL[0]: 0} | {k: v + 1 for k, v in vocab.items()}
    for index, token in enumerate(content["added_tokens"]):
        token["id"] = 0 if index == 0 else 400 + index


def leave_gaps(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab |= {token["content"]: 700 + 10 * i for i, token in enumerate(content["added_tokens"])}
    for token in content["added_tokens"]:
        token["id"] = vocab[token["content"]]


def write_strings(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def take_whole_stretches(content: dict[str, Any]) -> None:
    """As Llama 3; one of the pieces is made by no merge, so only a whole stretch is it."""
    content["model"]["ignore_merges"] = True
    content["model"]["vocab"]["ãģ¾ãģĻ"] = 400  # ます
    for token in content["added_tokens"]:
        token["id"] += 1


def add_plain_token(content: dict[str, Any]) -> None:
    """As Qwen's <think>: an added token that is not special, so a text gives it."""
    token = {**content["added_tokens"][-1], "id": 403, "content": "<think>", "special": False}
    content["added_tokens"].append(token)


CHANGES: dict[str, Change] = {
    "added tokens after the vocabulary": lambda content: None,
    "added tokens in it": add_digits_in_front,
    "unused ids": leave_gaps,
    "merges as strings": write_strings,
    "ignore_merges": take_whole_stretches,
    "NFC": lambda content: content.update(normalizer={"type": "NFC"}),
    "dropout": lambda content: content["model"].update(dropout=0.5),
    "an added token that is not special": add_plain_token,
    "a space before texts": lambda content: content["pre_tokenizer"]["pretokenizers"][1].update(
        add_prefix_space=True
    ),
}


def extend(auto: Any, folder: Path, pieces: int = 150) -> tuple[Vocabulary, list[str], Any]:
    """Learn pieces and add them, as steps 1 and 2; return both, and what was saved."""
    base = open_vocabulary(auto, [auto.eos_token_id], folder)
    lines = corpus.training_lines(demo_texts("ja", 30), {})
    config = replace(
        CONFIG, vocab_size=base.reserved + pieces, character_coverage=1.0, max_piece_length=16
    )
    merges, characters = learning.continue_merges(base, lines, config)
    learned = [*map("".join, merges), *characters]
    merged = merging.merge_pieces(base, learned, Policy.KANA)
    assert merged.added == learned
    merged.vocabulary.save(folder / "step2")
    return base, learned, AutoTokenizer.from_pretrained(folder / "step2")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_ids_of_the_base_stay(change: Change, tmp_path: Path) -> None:
    auto = make_byte_level(tmp_path, change)
    base, learned, extended = extend(auto, tmp_path)
    old = auto.get_vocab()
    new = extended.get_vocab()
    assert {piece: new[piece] for piece in old} == old
    assert not {*learned} & {*old}
    first = max(old.values()) + 1
    assert [new[piece] for piece in learned] == list(range(first, first + len(learned)))
    assert repr(extended.added_tokens_decoder) == repr(auto.added_tokens_decoder)
    stored = json.loads((tmp_path / "step2" / "tokenizer.json").read_text())
    assert {**stored["model"]["vocab"]} == new  # so no program numbers an added token itself
    assert stored["model"]["dropout"] is None
    assert not (tmp_path / "step2" / "tokenizer.model").exists()

    auto.backend_tokenizer.model.dropout = None
    before = TransformersTokenizer(auto, [auto.eos_token_id])
    after = TransformersTokenizer.open(tmp_path / "step2")
    assert (before.size, after.first_new_id, after.size) == (first, first, first + len(learned))
    english = merging.compare_segmentation(
        before,
        after,
        [*demo_texts("en", 20), *HOSTILE],
        Policy.KANA,
        content_of=base.content_of_text,
    )
    japanese = merging.compare_segmentation(
        before, after, demo_texts("ja", 40, "heldout"), Policy.KANA, content_of=base.content_of_text
    )
    merging.check_guarantee({"en": english, "ja": japanese}, Policy.KANA)
    assert japanese.tokens_after < 0.8 * japanese.tokens_before and len(japanese.used) > 50
    assert english.covered > 100
    for text in HOSTILE:
        if before.decode(before.encode(text)) == text:
            assert after.decode(after.encode(text)) == text
    # Special tokens spelled in a text stay text, with the same ids.
    merging.check_special_tokens(
        merging.compare_segmentation(before, after, base.special_tokens, Policy.KANA)
    )
    assert after.special_ids == before.special_ids


def test_settings_of_the_base_are_carried_over(tmp_path: Path) -> None:
    auto = make_byte_level(tmp_path)
    auto.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    auto.add_special_tokens({"pad_token": "<pad>", "bos_token": SPECIAL[1]})
    auto.padding_side, auto.model_max_length = "left", 77
    auto.model_input_names = ["input_ids", "attention_mask"]
    _, _, extended = extend(auto, tmp_path)
    assert extended.chat_template == auto.chat_template
    assert extended.special_tokens_map == auto.special_tokens_map
    assert (extended.padding_side, extended.model_max_length) == ("left", 77)
    assert extended.model_input_names == auto.model_input_names
    assert extended.clean_up_tokenization_spaces is False
    config = json.loads((tmp_path / "step2" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (config[FIRST_NEW_ID], config[EOS_IDS]) == (404, [auto.eos_token_id])


def test_a_base_without_new_pieces_is_saved_as_it_is(tmp_path: Path) -> None:
    auto = make_byte_level(tmp_path)
    base = open_vocabulary(auto, [0], tmp_path)
    merged = merging.merge_pieces(base, [], Policy.JAPANESE)
    merged.vocabulary.save(tmp_path / "step2")
    before, after = (
        TransformersTokenizer(auto, [0]),
        TransformersTokenizer.open(tmp_path / "step2"),
    )
    assert after.size == after.first_new_id == before.size == merged.counts()["vocabulary"]
    assert merged.counts()["added"] == 0
    texts = [*demo_texts("ja", 20), *HOSTILE]
    assert [after.encode(text) for text in texts] == [before.encode(text) for text in texts]


def test_an_added_token_that_would_become_text_is_refused(tmp_path: Path) -> None:
    """With `ignore_merges`, a stretch that spells an added token would be it from now on."""

    def name_word(content: dict[str, Any]) -> None:
        content["model"]["ignore_merges"] = True
        content["added_tokens"][2]["content"] = "qzxq"

    auto = make_byte_level(tmp_path, name_word)
    base, _, _ = extend(auto, tmp_path)
    before = TransformersTokenizer(auto, [auto.eos_token_id])
    after = TransformersTokenizer.open(tmp_path / "step2")
    names = merging.compare_segmentation(before, after, base.special_tokens, Policy.KANA)
    with pytest.raises(DataError, match=r"spell 1 special tokens .* 'qzxq': nothing was written"):
        merging.check_special_tokens(names)


def test_added_tokens_that_change_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = make_byte_level(tmp_path)
    other = make_byte_level(tmp_path / "other", add_digits_in_front)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda folder: other)
    with pytest.raises(DataError, match=r"added tokens would change .* first id 0: None would"):
        open_vocabulary(auto, [0], tmp_path).save(tmp_path / "step2")


# --- sentencepiece BPE in a tokenizer.json -------------------------------------------------------


def test_a_llama_is_extended_by_what_sentencepiece_learns(tmp_path: Path) -> None:
    auto = make_llama(tmp_path)
    base, learned, extended = extend(auto, tmp_path)
    assert len(auto) == base.size == 501
    assert any(len(piece) == 1 for piece in learned) and any(len(piece) > 2 for piece in learned)
    old, new = auto.get_vocab(), extended.get_vocab()
    assert {piece: new[piece] for piece in old} == old
    assert [new[piece] for piece in learned] == list(range(501, 501 + len(learned)))
    before = TransformersTokenizer(auto, [auto.eos_token_id])
    after = TransformersTokenizer.open(tmp_path / "step2")
    texts = {"en": demo_texts("en", 20), "ja": demo_texts("ja", 40, "heldout")}
    languages = {
        language: merging.compare_segmentation(before, after, some, Policy.KANA)
        for language, some in texts.items()
    }
    merging.check_guarantee(languages, Policy.KANA)
    assert languages["ja"].tokens_after < 0.6 * languages["ja"].tokens_before
    # The pieces are those of the extended sentencepiece model on every text.
    merged = base.extend(learned)
    lines = [line for text in texts["ja"] for line in text.split("\n") if line.strip()]
    for line, ids in zip(lines, merged.encode(lines), strict=True):
        expected = [index if index < 500 else index + 1 for index in ids]
        assert after.encode(line) == expected
    for text in HOSTILE:
        if before.decode(before.encode(text)) == text:
            assert after.decode(after.encode(text)) == text
