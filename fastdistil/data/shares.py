"""Which pieces a bilingual or multilingual student keeps (BiStil), and what that changes in how text is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdistil.data.text import Corpus, read

THRESHOLD = 1e-6


def kept_pieces(corpora: Sequence[Corpus], size: int, threshold: float = THRESHOLD) -> list[int]:
    """Ids, ascending, of the pieces whose share in one of the languages is at least `threshold`.

    `size` is the number of ids of the tokenizer that cut the corpora. Special tokens are not among them:
    `models.vocab.trim_vocabulary` keeps these anyway. Source: Ansell et al. 2023 (arXiv 2306.01709), with 1e-6.
    Raises ValueError where `threshold` is not above 0, or nothing is kept.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"kept_pieces: threshold is {threshold}, expected more than 0 and less than 1")
    keep: NDArray[np.bool_] = np.zeros(size, bool)
    for corpus in corpora:
        counts = corpus.counts(size)
        keep |= (counts > 0) & (counts >= threshold * counts.sum())
    if not keep.any():
        raise ValueError(
            f"kept_pieces: no piece has a share of {threshold} in any language, expected a lower threshold"
        )
    return [int(i) for i in np.flatnonzero(keep)]


def segmentation(
    corpora: Sequence[Corpus],
    before: Any,
    after: Any,
    *,
    documents: str = "line",
    column: str | None = None,
    cache: Any = None,
    most: int = 2000,
) -> dict[str, dict[str, float]]:
    """How a trimmed tokenizer cuts text, beside the one that it was made of, by language.

    Of at most `most` documents of each language, evenly spread: "words", what blanks part; "changed", the share of
    those with other pieces than before; "unknown", the share with an unknown piece that had none; "pieces_before" and
    "pieces_after", per word. `documents`, `column` and `cache` as the corpora were read with.
    """
    found = {}
    for corpus in corpora:
        texts: list[str] = []
        for source in corpus.sources:
            whole = read(source, documents=documents, column=column, cache=cache)
            step = max(1, len(whole) * len(corpus.sources) // most)
            texts += [x for x in whole.select(range(0, len(whole), step))["text"] if x]
        found[corpus.language] = compared([word for text in texts for word in text.split()], before, after)
    return found


def compared(words: Sequence[str], before: Any, after: Any) -> dict[str, float]:
    """What `segmentation` says of one language, from its words; each kind of word is cut once and counts as often as it
    comes."""
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    kinds, times = list(counts), np.array(list(counts.values()), np.float64)
    cut = [tokenizer(kinds, add_special_tokens=False)["input_ids"] if kinds else [] for tokenizer in (before, after)]
    names = [[t.convert_ids_to_tokens(ids) for ids in rows] for t, rows in zip((before, after), cut, strict=True)]
    unknown = [np.array([t.unk_token in row for row in rows]) for t, rows in zip((before, after), names, strict=True)]
    lengths = [np.array([len(row) for row in rows], np.float64) for rows in names]
    total = max(times.sum(), 1.0)
    shares: Mapping[str, Any] = {
        "words": times.sum(),
        "changed": times @ np.array([a != b for a, b in zip(*names, strict=True)], np.float64) / total
        if kinds
        else 0.0,
        "unknown": times @ (unknown[1] & ~unknown[0]).astype(np.float64) / total if kinds else 0.0,
        "pieces_before": times @ lengths[0] / total,
        "pieces_after": times @ lengths[1] / total,
    }
    return {name: float(value) for name, value in shares.items()}
