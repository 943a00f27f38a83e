"""A tiny corpus and tokenizer for the demo's tests."""

import numpy as np

from fastdistil.demo import corpora, teacher


def tokenizer(parsed):
    return teacher.build_tokenizer(parsed.pieces, parsed.unk, bos="<s>", eos="</s>", pad="<pad>", max_length=64)


def sentences(n, seed, held_out=False):
    """Words whose tag shows in their letters, so that a model can learn it."""
    draw = np.random.default_rng(seed)
    words = ["lamba", "ana", "rota", "kese", "moto", "."]
    made = []
    for _ in range(n):
        picked = [*draw.integers(0, len(words) - 1, draw.integers(4, 9)).tolist(), len(words) - 1]
        text = tuple(words[i] for i in picked)
        made.append(corpora.Sentence(text, tuple(w != "." for w in text), tuple(picked), held_out))
    return made


def corpus(language, n=40):
    return corpora.Corpus(language, sentences(n, len(language)), sentences(12, len(language) + 1, True))
