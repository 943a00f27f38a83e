"""The demo's teacher and texts as files that the commands read: the first steps of docs/recipes.md run on them.

| in the folder | what |
|---|---|
| encoder/ | multilingual-e5-small with the vocabulary cut to the training texts, for AutoModel and AutoTokenizer |
| zh.train.tsv, tr.train.tsv, el.train.tsv | a word and its tag per line, a blank line between sentences |
| zh.test.tsv, ... | the same from documents that no training file holds |
| zh.txt, tr.txt, el.txt | text alone, a sentence per line |
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from fastdistil.demo.corpora import TAGS, Sentence
from fastdistil.demo.material import Source
from fastdistil.models.trim import trim_model_
from fastdistil.systems.folder import write_text

CODES = {"Chinese": "zh", "Turkish": "tr", "Greek": "el"}
TRAIN, TEST, TEXT = 1500, 300, 4000  # sentences of a language
CARD = """---
license: mit
base_model: intfloat/multilingual-e5-small
library_name: transformers
---

# multilingual-e5-small, its vocabulary cut to the demo's texts
"""


def _columns(sentences: Iterable[Sentence]) -> str:
    return "".join(
        "".join(f"{word}\t{TAGS[tag]}\n" for word, tag in zip(s.words, s.tags, strict=True)) + "\n" for s in sentences
    )


def _lines(sentences: Iterable[Sentence]) -> str:
    found = []
    for s in sentences:
        spaced = (
            (" " if space and i else "") + word for i, (word, space) in enumerate(zip(s.words, s.spaces, strict=True))
        )
        found.append("".join(spaced) + "\n")
    return "".join(found)


def write(source: Source, out: Path, say: Callable[[str], None]) -> None:
    """Write the folder, the same whatever the demo's seed. Files that are there stay."""
    out.mkdir(parents=True, exist_ok=True)
    for corpus in source.corpora:
        draw = random.Random(f"folders/{corpus.language}")
        train, test = draw.sample(corpus.train, len(corpus.train)), draw.sample(corpus.test, len(corpus.test))
        code = CODES[corpus.language]
        labelled, rest = train[:TRAIN], train[TRAIN : TRAIN + TEXT]
        for name, text in (
            (f"{code}.train.tsv", _columns(labelled)),
            (f"{code}.test.tsv", _columns(test[:TEST])),
            (f"{code}.txt", _lines(rest)),
        ):
            if not (out / name).exists():
                write_text(out / name, text)
    if (out / "encoder" / "config.json").exists():
        return
    say(f"writing the encoder and texts into {out}")
    partial = out / "encoder.partial"
    model = copy.deepcopy(source.model)
    trim_model_(model, source.rows)
    model.save_pretrained(partial)
    source.student_tokenizer.save_pretrained(partial)
    write_text(partial / "README.md", CARD)
    partial.rename(out / "encoder")
