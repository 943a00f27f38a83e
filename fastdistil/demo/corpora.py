"""Turkish, Chinese and Greek sentences with one coarse tag a word, split so that no held-out document is trained on.

| language | source | held-out part |
|---|---|---|
| Turkish | web and Wikipedia treebanks (CoNLL-U) | documents, by a hash of the document's name |
| Chinese | People's Daily, January 1998 (word/tag) | the last tenth of the month |
| Greek | SBL Greek New Testament (MorphGNT columns) | the books Mark, Acts, Hebrews, 2 Corinthians and Jude |
"""

from __future__ import annotations

import random
import re
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastdistil.demo import fetch

TAGS = ("NOUN", "NAME", "VERB", "ADJ", "ADV", "PRON", "DET", "NUM", "ADP", "CONJ", "PRT", "PUNCT", "X")
LANGUAGES = ("Chinese", "Turkish", "Greek")
MIN_WORDS, MAX_WORDS = 4, 60  # a shorter line is a heading, a longer one would mostly be cut away

_TURKISH = {"ONOM": "X", "AFFIX": "X"}  # all other tags of the treebank have the common names
_CHINESE = {
    "NOUN": "n vn an Ng na t Tg f s j",
    "NAME": "nr ns nt nz nx",
    "VERB": "v Vg vvn",
    "ADJ": "a b z Ag Bg",
    "ADV": "d ad vd Dg",
    "PRON": "r Rg",
    "NUM": "m q Mg",
    "ADP": "p",
    "CONJ": "c",
    "PRT": "u y Yg k h",
    "PUNCT": "w",
    "X": "i l e o",
}
_CHINESE_TAG = {fine: coarse for coarse, fines in _CHINESE.items() for fine in fines.split()}
_GREEK = {
    "N-": "NOUN",
    "V-": "VERB",
    "A-": "ADJ",
    "D-": "ADV",
    "RA": "DET",
    "RD": "PRON",
    "RI": "PRON",
    "RP": "PRON",
    "RR": "PRON",
    "P-": "ADP",
    "C-": "CONJ",
    "X-": "PRT",
    "I-": "X",
}
_GREEK_HELD_OUT = ("62-Mk", "65-Ac", "68-2Co", "79-Heb", "86-Jud")


@dataclass(frozen=True)
class Sentence:
    """Words, whether a space stands before each, and each word's index in TAGS. All three have equal length."""

    words: tuple[str, ...]
    spaces: tuple[bool, ...]
    tags: tuple[int, ...]
    held_out: bool


@dataclass(frozen=True)
class Corpus:
    """One language: `train` and `test` share no document; both in the order of the source."""

    language: str
    train: list[Sentence]
    test: list[Sentence]


def _sentence(rows: list[tuple[str, bool, str]], held_out: bool) -> Sentence | None:
    """A Sentence from rows of (word, space before, tag), or None where its length is outside the bounds."""
    if not MIN_WORDS <= len(rows) <= MAX_WORDS:
        return None
    words, spaces, tags = zip(*rows, strict=True)
    return Sentence(words, spaces, tuple(TAGS.index(tag) for tag in tags), held_out)


def turkish(conllu: str) -> Iterator[Sentence]:
    """Sentences of a CoNLL-U text. Rows tied by the relation `ig` are inflectional groups of one word: the last one's
    tag is the word's."""
    for block in re.split(r"\n\s*\n", conllu):
        rows: list[tuple[str, bool, str]] = []
        held_out, prefix, space, before = False, "", True, True
        for line in block.splitlines():
            if line.startswith("# sent_id"):
                document = line.split("=", 1)[1].strip().rsplit(":", 1)[0]
                held_out = zlib.crc32(document.encode()) % 5 == 0
            columns = line.split("\t")
            if line.startswith("#") or len(columns) < 10:
                continue
            word, tag, fine, relation = prefix + columns[1], columns[3], columns[4], columns[7]
            before = space if not prefix else before
            space = "SpaceAfter=No" not in columns[9]
            if relation == "ig":
                prefix = word
                continue
            prefix = ""
            rows.append((word, before, "NAME" if fine == "NNP" else _TURKISH.get(tag, tag)))
        if (sentence := _sentence(rows, held_out)) is not None:
            yield sentence


def chinese(text: str) -> Iterator[Sentence]:
    """Sentences of lines of `word/tag` pairs, cut after 。！？; the last tenth of the lines is held out."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        rows: list[tuple[str, bool, str]] = []
        for pair in line.split():
            word, _, fine = pair.rpartition("/")
            if not word or fine not in _CHINESE_TAG:
                continue
            rows.append((word, not rows, _CHINESE_TAG[fine]))
            if word in "。！？":
                if (sentence := _sentence(rows, number >= 0.9 * len(lines))) is not None:
                    yield sentence
                rows = []
        if (sentence := _sentence(rows, number >= 0.9 * len(lines))) is not None:
            yield sentence


def _bare(word: str) -> str:
    """Without accents, breathings and the apparatus marks of the edition."""
    letters = (c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c) and c not in "⸀⸁⸂⸃⸄⸅⟦⟧[]—")
    return unicodedata.normalize("NFC", "".join(letters))


def greek(text: str, held_out: bool) -> Iterator[Sentence]:
    """Verses of one book's MorphGNT lines: reference, class, parsing, text, word, normalised, lemma (some editions add
    a column before the text). A noun with a capital lemma is a name; punctuation after a word is a word of its own."""
    verse, rows = "", list[tuple[str, bool, str]]()
    for line in [*text.splitlines(), "end"]:
        columns = line.split()
        if columns and columns[0] != verse:
            if (sentence := _sentence(rows, held_out)) is not None:
                yield sentence
            verse, rows = columns[0], []
        if len(columns) < 7 or columns[1] not in _GREEK:
            continue
        token, lemma = _bare(columns[-4]), columns[-1]
        word = token.rstrip(",.·;:")
        if not word:
            continue
        tag = "NAME" if columns[1] == "N-" and lemma[0].isupper() else _GREEK[columns[1]]
        rows.append((word, True, tag))
        rows += [(mark, False, "PUNCT") for mark in token[len(word) :]]
    return


def load(language: str, cache: Path | None = None) -> Corpus:
    """Fetch and parse the corpus of one of LANGUAGES. ValueError for another name, and as `fetch.fetch`."""
    if language == "Turkish":
        files = fetch.read_members(fetch.fetch(fetch.TURKISH, cache), ["web.conllu", "wiki.conllu"])
        sentences = [s for data in files.values() for s in turkish(data.decode("utf-8"))]
    elif language == "Chinese":
        files = fetch.read_members(fetch.fetch(fetch.CHINESE, cache), ["/tag/199801.txt"])
        sentences = [s for data in files.values() for s in chinese(data.decode("utf-8"))]
    elif language == "Greek":
        files = fetch.read_members(fetch.fetch(fetch.GREEK, cache), ["-morphgnt.txt"])
        sentences = [
            s
            for name, data in files.items()
            for s in greek(data.decode("utf-8"), any(book in name for book in _GREEK_HELD_OUT))
        ]
    else:
        raise ValueError(f"load: language is {language!r}, expected one of {LANGUAGES}")
    return Corpus(language, [s for s in sentences if not s.held_out], [s for s in sentences if s.held_out])


@dataclass(frozen=True)
class Sample:
    """What one seed draws from one corpus; `pool` is the rest of the training text, of which only counts are used."""

    language: str
    labelled: list[Sentence]
    unlabelled: list[Sentence]
    test: list[Sentence]
    pool: list[Sentence]


def sample(corpus: Corpus, *, labelled: int, unlabelled: int, test: int, seed: int) -> Sample:
    """Draw disjoint sentences: labelled and unlabelled from `train`, test from `test`.

    Raises ValueError where the corpus is too small.
    """
    if len(corpus.train) < labelled + unlabelled or len(corpus.test) < test:
        raise ValueError(
            f"sample: {corpus.language} has {len(corpus.train)} + {len(corpus.test)} sentences, "
            f"wanted {labelled + unlabelled} + {test}"
        )
    draw = random.Random(f"{seed}/{corpus.language}")
    train = draw.sample(corpus.train, len(corpus.train))
    held_out = draw.sample(corpus.test, test)
    cut = labelled + unlabelled
    return Sample(corpus.language, train[:labelled], train[labelled:cut], held_out, train[cut:])
