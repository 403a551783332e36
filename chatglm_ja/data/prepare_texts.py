"""Pretraining blocks: read, clean, filter, tokenise; drop duplicates; mix; pack.

    chunks of records --(processes)--> units of tokenised documents        units.py, index.py
    index of all documents --> duplicates dropped, validation chosen       duplicates.py, mixture.py
                           --> documents drawn to the shares' budgets
                           --> plan of the blocks                          packing.py
    plan and units --(processes)--> Arrow shards                           shards.py

A document becomes [gMASK] sop, its tokens, </s>: the form in which ChatGLM3 reads every text. Text
that says "</s>" stays text.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_ja.chatglm3 import chat_format, tokenizer
from chatglm_ja.data import arrow, cleaning, corpus, dedup, mixing, packing, units
from chatglm_ja.data.fast_encoder import CorpusEncoder
from chatglm_ja.data.index import Index, make_index
from chatglm_ja.data.settings import PrepareDataConfig
from chatglm_ja.errors import DataError
from chatglm_ja.storage.inputs import Input

# Documents are encoded together up to this many characters: enough for numpy, little memory.
BATCH_CHARACTERS = 2**20
TRAIN, VALIDATION = "pretrain_train", "pretrain_validation"


@dataclass(frozen=True)
class TextPreparer:
    """Makes the unit of a chunk of texts."""

    tokenizer: Path
    unicode_form: str
    min_characters: int
    check_language: bool
    with_signatures: bool
    overlap_file: Path | None

    def __call__(self, task: units.Task) -> dict[str, Any]:
        unit = units.Unit(file=Path(task.chunk.file).name)
        batch: list[corpus.Document] = []
        characters = 0
        for document in corpus.read_documents(task.chunk, task.source):
            if not isinstance(document, corpus.Document):
                unit.rejects.append(document)
                continue
            batch.append(document)
            characters += len(document.text)
            if characters >= BATCH_CHARACTERS:
                self._add(unit, batch, task.source.language)
                batch, characters = [], 0
        self._add(unit, batch, task.source.language)
        return unit.write(task.stem)

    def _add(self, unit: units.Unit, batch: list[corpus.Document], language: str) -> None:
        texts = [cleaning.clean(document.text, self.unicode_form) for document in batch]
        unit.found += len(batch)
        unit.text_bytes += sum(len(document.text.encode()) for document in batch)
        codes = cleaning.code_points(texts)
        checked = language if self.check_language else None
        reasons = cleaning.drop_reasons(texts, codes, checked, self.min_characters)
        encoder, prefix, overlap = _tools(self.tokenizer, self.overlap_file)
        kept = [place for place, reason in enumerate(reasons) if reason is None]
        encoded = encoder.encode([texts[place] for place in kept])
        for place, ids in zip(kept, encoded, strict=True):
            if overlap is not None and dedup.has_overlap(ids, overlap):
                reasons[place] = "contaminated"
                continue
            document = batch[place]
            unit.tokens.append(np.concatenate([prefix, ids, [tokenizer.EOS_ID]], dtype=np.int32))
            unit.record.append(document.record)
            unit.digest.append(dedup.text_digest(texts[place]))
            unit.identity.append(units.identity(document.id))
        unit.counts.update(reason for reason in reasons if reason is not None)
        if self.with_signatures:
            lengths = np.array([len(text) for text in texts], dtype=np.int64)
            keep = np.array([reason is None for reason in reasons], dtype=bool)
            unit.signatures.append(
                dedup.minhash_signatures(codes[np.repeat(keep, lengths)], lengths[keep])
            )


@functools.cache
def _tools(
    folder: Path, overlap_file: Path | None
) -> tuple[CorpusEncoder, np.ndarray, np.ndarray | None]:
    """The tokenizer, the ids that begin a document, evaluation n-grams: once for a process."""
    encoder = CorpusEncoder(tokenizer.read_proto(folder / tokenizer.MODEL_FILE))
    prefix = np.array(chat_format.prefix_ids(tokenizer.load_processor(folder)), dtype=np.int32)
    overlap = None if overlap_file is None else np.load(overlap_file, allow_pickle=False)
    return encoder, prefix, overlap


def contents(config: PrepareDataConfig, inputs: Sequence[Input]) -> list[dict[str, Any]]:
    """What shapes the units of each source: its files, its settings, the tokenizer."""
    read = {source.role: source for source in inputs}
    evaluation = read.get("evaluation_texts")
    names = ("unicode_form", "min_characters", "check_language")
    shared = {
        **{name: getattr(config, name) for name in names},
        "decontaminate": [source.settings() for source in config.decontaminate],
        "evaluation_texts": evaluation and evaluation.fingerprint,
        "signatures": config.near_duplicates > 0,
        "tokenizer": read["step2_merge_tokenizer"].fingerprint,
    }
    return units.contents(config.sources, read["texts"].source_fingerprints, shared)


def prepare(config: PrepareDataConfig, folders: Sequence[Path]) -> Index:
    """Tokenise every source into units in its folder; ids that were seen are dropped."""
    overlap_file = None
    if config.decontaminate:
        overlap_file = folders[0] / "overlap.npy"
        encoder = tokenizer.load_processor(config.tokenizer)
        texts = (text for source in config.decontaminate for text in corpus.read_texts(source))
        cleaned = (cleaning.clean(text, config.unicode_form) for text in texts)
        grams = dedup.overlap_hashes(encoder.encode(text, return_type="numpy") for text in cleaned)
        np.save(overlap_file, grams, allow_pickle=False)
    preparer = TextPreparer(
        config.tokenizer,
        config.unicode_form,
        config.min_characters,
        config.check_language,
        config.near_duplicates > 0,
        overlap_file,
    )
    return make_index(preparer, config.sources, folders, config, "texts")


def write(
    index: Index, config: PrepareDataConfig, shares: Mapping[str, float], folder: Path
) -> dict[str, Any]:
    """Drop duplicates, mix to `shares`, pack and write the shards; returns the counts."""
    index.drop_duplicates()
    if config.near_duplicates:
        index.drop_near_duplicates(config.near_duplicates)
    held = _validation(index, config, shares)
    usable = index.usable()
    kept_back = np.concatenate([np.zeros(0, np.int64), *held.values()])
    trainable = usable[~np.isin(usable, kept_back)]
    pools = mixing.build_pools(
        config.sources, shares, config.total_tokens, trainable, index.source, index.length
    )
    mixing.check_budgets(pools, config.total_tokens, config.max_repeats)
    drawn = mixing.draw_documents(pools, index.length, config.seed)
    if config.packing == "concat":
        plan = packing.plan_concat(drawn.length, config.block_size)
    else:
        plan = packing.plan_best_fit(drawn.length, config.block_size)
        # The blocks of the longest documents come first: no order to train in.
        plan = plan.take(np.random.default_rng(config.seed).permutation(len(plan)))
    if not len(plan):
        raise DataError(
            f"{config.total_tokens} tokens do not fill a block of {config.block_size}: ask for more"
        )
    arrow.write_shards(folder, TRAIN, plan, index, drawn.document, processes=config.num_processes)

    plans = {
        language: packing.plan_concat(index.length[documents], config.block_size, keep_tail=True)
        for language, documents in held.items()
    }
    shifted, before = [], 0
    for language, part in plans.items():
        shifted.append(
            packing.PackingPlan(part.item + before, part.start, part.length, part.bounds)
        )
        before += len(held[language])
    labels = [language for language, part in plans.items() for _ in range(len(part))]
    validation = packing.join_plans(shifted)
    arrow.write_shards(
        folder, VALIDATION, validation, index, kept_back, processes=1, language=labels
    )
    return _counts(index, config, shares, plan, drawn, held)


def _validation(
    index: Index, config: PrepareDataConfig, shares: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """The documents of each language that are kept for validation."""
    held = {}
    for language in shares:
        mine = index.usable(language)
        chosen = mixing.choose_validation(
            index.length[mine],
            index.digest[mine],
            config.validation_tokens // len(shares),
            language,
        )
        held[language] = mine[chosen]
    return held


def _counts(
    index: Index,
    config: PrepareDataConfig,
    shares: Mapping[str, float],
    plan: packing.PackingPlan,
    drawn: mixing.Draw,
    held: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """What the manifest and the report say."""
    # Tokens of each drawn document that are in a block: less the tail that filled none.
    used = np.bincount(plan.item, weights=plan.length, minlength=len(drawn.document))
    source_of = index.source[drawn.document]
    kept_back = np.zeros(len(index), dtype=bool)
    for documents in held.values():
        kept_back[documents] = True
    sources = []
    for number, source in enumerate(config.sources):
        mine = index.source == number
        trained = np.unique(drawn.document[source_of == number])
        usable = mine & (index.dropped == 0)
        tokens = int(used[source_of == number].sum())
        available = int(index.length[usable & ~kept_back].sum())
        sources.append(
            {
                "name": source.title,
                **index.counts(number),
                "tokens": int(index.length[usable].sum()),
                "validation_documents": int(kept_back[mine].sum()),
                "train_documents": len(trained),
                "train_tokens": tokens,
                "repeats": round(tokens / available, 3) if available else 0.0,
            }
        )
    train: dict[str, int] = dict.fromkeys(shares, 0)
    for source, entry in zip(config.sources, sources, strict=True):
        train[source.language] += entry["train_tokens"]
    total = int(plan.block_lengths().sum())
    return {
        "blocks": len(plan),
        "block_size": config.block_size,
        "packing": config.packing,
        "fill": round(total / (len(plan) * config.block_size), 4),
        "tail_tokens_dropped": int(drawn.length.sum()) - total,
        "train_tokens": train,
        "train_shares": {name: round(n / total, 4) for name, n in train.items()},
        "validation_tokens": {name: int(index.length[ids].sum()) for name, ids in held.items()},
        "documents_cut": _cut(plan),
        "near_duplicates": dedup.describe_method(config.near_duplicates),
        "sources": sources,
    }


def _cut(plan: packing.PackingPlan) -> int:
    """How many drawn documents lie in more than one block."""
    return int((np.bincount(plan.item) > 1).sum()) if len(plan.item) else 0
