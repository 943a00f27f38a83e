"""Tiny tokenizers of every kind, models and files for the tests of labelled text."""

import json

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

TEXT = ["the cat sat on the mat in Paris", "København ligger i Danmark", "私は東京", "a b c d # @ 1 0"]
FILE = """# id = one
Anna\tB-PER
bor\tO
i\tO
Ny\tB-LOC
By\tI-LOC

# id = two
#Paris\tI-LOC
10 000\tO
\x01\tO
Bo\tB-PER
"""


def wordpiece():
    """As BERT's."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = sorted({letter for line in TEXT for letter in line if letter != " "})
    words = ["the", "cat", "sat", "on", "mat", "in", "Paris", "Kø", "##ben", "##havn", "Dan", "##mark"]
    # A trained vocabulary would be another one every time.
    pieces = [*special, *letters, *("##" + letter for letter in letters), *words]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        **dict(zip(names, special, strict=True)),
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def unigram():
    """As XLM-R's."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(TEXT, trainer)
    ends = [("<s>", 0), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    return _byte_or_unigram(made, unk_token="<unk>")


def byte_bpe(add_prefix_space):
    """As RoBERTa's, with and without a space before the first word."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    letters = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=letters, show_progress=False)
    made.train_from_iterator(TEXT, trainer)
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=add_prefix_space)
    return _byte_or_unigram(made, add_prefix_space=add_prefix_space)


def _byte_or_unigram(made, **options):
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
        **options,
    )


TOKENIZERS = {
    "wordpiece": wordpiece,
    "unigram": unigram,
    "byte BPE, prefix": lambda: byte_bpe(True),
    "byte BPE": lambda: byte_bpe(False),
}


def tiny_encoder(folder, tokenizer=None, **options):
    """A folder with a random BERT of two blocks of width 16 and its tokenizer."""
    tokenizer = tokenizer or wordpiece()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tagged(path, sentences=24):
    """A column file whose tags a tiny model can learn: Paris and København are places, Danmark an organisation."""
    words = ["the", "cat", "Paris", "mat", "København", "Danmark", "on"]
    kinds = {"Paris": "B-LOC", "København": "B-LOC", "Danmark": "B-ORG"}
    lines = []
    for i in range(sentences):
        row = [words[(i * k + k) % len(words)] for k in range(1, 5 + i % 3)]
        lines += [f"# id = {i}", *(f"{word}\t{kinds.get(word, 'O')}" for word in row), ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def labelled_texts(path, pairs=False):
    """JSON Lines whose labels a tiny model can learn: whether Paris stands there."""
    rows = []
    for i in range(24):
        text = f"the {'cat' if i % 2 else 'mat'} sat in {'Paris' if i % 3 else 'Danmark'}"
        rows.append({"text": text, "label": "in" if i % 3 else "out"} | ({"text_pair": "on the mat"} if pairs else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
