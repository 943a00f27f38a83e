#!/usr/bin/env bash
# Byte-level BPE tokenizers take words one by one without a space before them, and no longer say that they cannot.
#
# Believed: GPT-2's and RoBERTa's tokenizers refuse `is_split_into_words=True` unless they were made with
# add_prefix_space=True, as transformers 4 did with an AssertionError; so that whoever tags words with them finds out.
# Really, in transformers 5.17.0 with tokenizers 0.23.3: there is no error and no warning. Every word is cut as if it stood
# at the beginning of a text, without the space that the model has seen before it: other pieces, often more of them, and
# other ids than those of the same sentence as running text. A tagger trained so works, a teacher read so answers for
# another text. What helps is add_prefix_space=True, or to compare the pieces of the words with those of the text first.
# Date: 2026-11-30
#
# Exits 0 while it is so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.17.0 tokenizers==0.23.3 2> /dev/null
"$folder/venv/bin/python" - << 'PYTHON'
import json
import sys
import warnings

import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, RobertaTokenizer

words = "the cat sat on the mat".split()
learned = Tokenizer(models.BPE())
learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = pre_tokenizers.ByteLevel.alphabet()
learned.train_from_iterator(
    ["a " + " ".join(words)] * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
)
model = json.loads(learned.to_str())["model"]
merges = [tuple(pair) for pair in model["merges"]]
vocab = model["vocab"] | {name: len(model["vocab"]) + i for i, name in enumerate(("<s>", "</s>", "<pad>", "<unk>", "<mask>"))}

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
same = []
for cls, space in ((GPT2Tokenizer, False), (RobertaTokenizer, False), (GPT2Tokenizer, True), (RobertaTokenizer, True)):
    tokenizer = cls(vocab=vocab, merges=merges, add_prefix_space=space)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        ids = tokenizer(words, is_split_into_words=True, add_special_tokens=False)["input_ids"]
    pieces, text = tokenizer.convert_ids_to_tokens(ids), tokenizer.tokenize(" ".join(words))
    same.append(pieces == text)
    print(cls.__name__, f"add_prefix_space={space}, warnings: {len(heard)}")
    print("  words:", *pieces)
    print("  text: ", *text)
    if heard:
        sys.exit(1)
sys.exit(0 if same == [False, False, True, True] else 1)
PYTHON
