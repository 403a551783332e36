"""Step 4's pretraining blocks: tokenize texts, drop duplicates, mix, pack.

    chunks of records --(processes)--> tokenized chunks on disk      token_store.py
    index of documents --> duplicates dropped                        document_index.py, dedup.py
                                                                     near_duplicates.py
                       --> validation and training documents chosen  mixing.py
                       --> plan of the blocks                        packing.py
    plan and chunks --(processes)--> Arrow shards                    dataset.py

A document becomes the tokens in which the base reads every text, such as [gMASK] sop, its own, and
the one that ends it, such as </s>. Text that says "</s>" stays text.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_ja.data import (
    corpus,
    dataset,
    decontamination,
    filters,
    language_id,
    mixing,
    near_duplicates,
    packing,
    token_store,
)
from chatglm_ja.data.cleaning import Fate
from chatglm_ja.data.corpus import Document
from chatglm_ja.data.document_index import DocumentIndex
from chatglm_ja.data.settings import PrepareDataConfig
from chatglm_ja.data.token_store import ChunkTask, StoredChunk, TokenizedChunk
from chatglm_ja.errors import DataError
from chatglm_ja.source_files import file_format
from chatglm_ja.sources import Source, printable

log = logging.getLogger(__name__)

# Shorter documents are fragments; their count, which is not a fate: the filters decide on them.
FRAGMENT_CHARACTERS = 100
FRAGMENTS = "fragments"
# Documents are tokenized in batches of this many characters: enough for numpy, little memory.
BATCH_CHARACTERS = 2**20


def prepare(config: PrepareDataConfig, folders: Sequence[Path]) -> DocumentIndex:
    """Tokenize every source into its folder; return the index of the documents."""
    overlap_file = decontamination.write_overlap_file(config, folders[0])
    tokenize = functools.partial(tokenize_texts, config, overlap_file)
    chunks = token_store.tokenize_sources(tokenize, config.sources, folders, config, "texts")
    index = DocumentIndex(config.sources, chunks)
    _warn_of_fragments(index)
    return index


def _warn_of_fragments(index: DocumentIndex) -> None:
    """Warn of sources whose median document is a fragment, such as a line of a longer text."""
    for number, source in enumerate(index.sources):
        counts = index.counts(number)
        if counts.get(FRAGMENTS, 0) > counts.get("documents", 0) / 2:
            is_text = any(file_format(path) == "txt" for path in source.files())
            cure = "a document should be a whole text: join the parts that belong together"
            if is_text and source.format == "lines":
                cure = (
                    "each line of a .txt file is one: for longer texts, set format=paragraphs or "
                    "format=document"
                )
            elif is_text and source.format == "paragraphs":
                cure = "each paragraph is one: for longer texts, set format=document"
            log.warning(
                "%s: most of its %s documents have fewer than %d characters; %s",
                source.title, f"{counts['documents']:,}", FRAGMENT_CHARACTERS, cure,
            )  # fmt: skip


def tokenize_texts(
    config: PrepareDataConfig, overlap_file: Path | None, task: ChunkTask
) -> StoredChunk:
    """Clean, filter and tokenize a chunk of texts, unless an earlier run stored it.

    `overlap_file` holds the n-grams of the evaluation texts, see decontamination.py.
    """
    if stored := token_store.find_chunk(task.stem, task.number):
        return stored
    tokenized = TokenizedChunk(file=printable(Path(task.chunk.file).name))
    batch: list[Document] = []
    characters = 0
    for document in corpus.read_documents(task.chunk, task.source, config.unicode_form):
        if not isinstance(document, Document):
            tokenized.rejects.append(document)
            continue
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            _add_batch(tokenized, batch, task.source, config, overlap_file)
            batch, characters = [], 0
    _add_batch(tokenized, batch, task.source, config, overlap_file)
    return tokenized.write(task.stem, task.number)


def _add_batch(
    tokenized: TokenizedChunk,
    batch: Sequence[Document],
    source: Source,
    config: PrepareDataConfig,
    overlap_file: Path | None,
) -> None:
    """Tokenize the documents that no filter drops, and count the others."""
    texts = [document.text for document in batch]
    tokenized.found += len(batch)
    tokenized.text_bytes += sum(len(text.encode()) for text in texts)
    tokenized.counts[FRAGMENTS] += sum(len(text) < FRAGMENT_CHARACTERS for text in texts)
    codes = language_id.code_points(texts)
    fates = filters.apply_filters(
        texts, codes, source, config.min_characters, config.check_language
    )
    tokenizer = token_store.load_tokenizer(config.tokenizer)
    known = decontamination.load_overlap(overlap_file)
    candidates = [place for place, fate in enumerate(fates) if fate is Fate.KEPT]
    encoded = tokenizer.encode_documents([texts[place] for place in candidates])
    start = np.array(tokenizer.document_start, dtype=np.int32)
    end = np.array([tokenizer.document_end], dtype=np.int32)
    for place, ids in zip(candidates, encoded, strict=True):
        if len(found := decontamination.find_overlaps(ids, known)):
            rest = decontamination.cut_overlaps(texts[place], ids, found, tokenizer)
            if rest is None or len(rest) < config.min_characters:
                fates[place] = Fate.CONTAMINATED
                continue
            tokenized.counts[decontamination.CUT_OUT] += 1
            texts[place] = rest
            (ids,) = tokenizer.encode_documents([rest])
        tokens = np.concatenate([start, ids, end])
        tokenized.add(tokens, batch[place].record, texts[place], batch[place].id)
    for document, fate in zip(batch, fates, strict=True):
        if fate is not Fate.KEPT:
            origin = f"{source.title}, record {document.record:,}"
            tokenized.drop(fate, document.text, origin)
    if config.near_duplicates:
        kept = [text for text, fate in zip(texts, fates, strict=True) if fate is Fate.KEPT]
        tokenized.signatures.append(near_duplicates.minhash_signatures(kept))


def write(
    index: DocumentIndex, config: PrepareDataConfig, shares: Mapping[str, float], folder: Path
) -> tuple[dict[str, Any], packing.PackingPlan]:
    """Drop duplicates, draw documents to fill `shares`, pack them and write the shards.

    Returns the counts for the manifest and the report, and the plan of the training blocks, whose
    items are documents of the index. Raises DataError if the text is too little.
    """
    index.drop_duplicates()
    if config.near_duplicates:
        index.drop_near_duplicates(config.near_duplicates, config.num_processes)
    held_out = {}
    for language in shares:
        candidates = index.kept_documents(language)
        limit = config.validation_tokens // len(shares)
        places = mixing.choose_validation(
            index.length[candidates], index.digest[candidates], limit, language
        )
        held_out[language] = candidates[places]
    documents = index.kept_documents()
    trainable = documents[~np.isin(documents, np.concatenate(list(held_out.values())))]
    pools = mixing.build_pools(
        config.sources, shares, config.total_tokens, trainable, index.source, index.length
    )
    mixing.check_budgets(pools, config.total_tokens, config.max_repeats)
    drawn = mixing.draw_documents(pools, index.length, config.seed)
    if config.packing == "concat":
        plan = packing.plan_concat(drawn.length, config.block_size)
    else:
        plan = packing.plan_best_fit(drawn.length, config.block_size).shuffle(config.seed)
    if not len(plan):
        raise DataError(
            f"{config.total_tokens} tokens do not fill a block of {config.block_size}: "
            "raise --total-tokens"
        )
    processes = config.num_processes
    dataset.write_shards(folder, "pretrain_train", plan, index, drawn.document, processes=processes)
    _write_validation(index, config, held_out, folder)
    counts = _count(index, config, plan, drawn, held_out)
    return counts, dataclasses.replace(plan, item=drawn.document[plan.item])


def _write_validation(
    index: DocumentIndex,
    config: PrepareDataConfig,
    held_out: Mapping[str, np.ndarray],
    folder: Path,
) -> None:
    """Write the validation blocks; each holds one language, and the last of each may be short."""
    plans, languages, before = [], [], 0
    for language, documents in held_out.items():
        plan = packing.plan_concat(index.length[documents], config.block_size, keep_tail=True)
        plans.append(dataclasses.replace(plan, item=plan.item + before))
        languages += [language] * len(plan)
        before += len(documents)
    plan, documents = packing.join_plans(plans), np.concatenate(list(held_out.values()))
    dataset.write_shards(
        folder, "pretrain_validation", plan, index, documents, processes=1, languages=languages
    )


def _count(
    index: DocumentIndex,
    config: PrepareDataConfig,
    plan: packing.PackingPlan,
    drawn: mixing.Draw,
    held_out: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Return the counts for the manifest and the report."""
    # Tokens of each drawn document that are in a block: all but the tail that filled none.
    used = np.bincount(plan.item, weights=plan.length, minlength=len(drawn.document))
    drawn_source = index.source[drawn.document]
    is_held_out = np.zeros(len(index), dtype=bool)
    is_held_out[np.concatenate(list(held_out.values()))] = True
    is_kept = index.is_fate(Fate.KEPT)
    sources = []
    train: dict[str, int] = dict.fromkeys(held_out, 0)
    for number, source in enumerate(config.sources):
        own = index.source == number
        tokens = int(used[drawn_source == number].sum())
        available = int(index.length[own & is_kept & ~is_held_out].sum())
        train[source.language] += tokens
        sources.append(
            {
                "name": source.title,
                **index.counts(number),
                "tokens": int(index.length[own & is_kept].sum()),
                "validation_documents": int(is_held_out[own].sum()),
                "train_documents": len(np.unique(drawn.document[drawn_source == number])),
                "train_tokens": tokens,
                "repeats": round(tokens / available, 3) if available else 0.0,
            }
        )
    total = int(plan.block_lengths().sum())
    return {
        "blocks": len(plan),
        "block_size": config.block_size,
        "packing": config.packing,
        "fill": round(total / (len(plan) * config.block_size), 4),
        "tail_tokens_dropped": int(drawn.length.sum()) - total,
        "train_tokens": train,
        "train_shares": {name: round(n / total, 4) for name, n in train.items()},
        "validation_tokens": {name: int(index.length[ids].sum()) for name, ids in held_out.items()},
        "documents_cut": int((np.bincount(plan.item) > 1).sum()),
        "near_duplicates": {
            "threshold": config.near_duplicates,
            "hashes": near_duplicates.NUM_HASHES,
            "bands": near_duplicates.BANDS,
            "shingle_characters": near_duplicates.SHINGLE_CHARACTERS,
        },
        "sources": sources,
    }
