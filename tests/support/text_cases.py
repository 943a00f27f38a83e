"""Small tokenizers, texts and models for the systems that read raw text."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

_WORDS = ["abc", "abcd", "bca", "cab", "dexy", "xyz", "zyx", "abcxyz", "exa", "dd", "yab", "bx", "caxe", "eda", "dyz"]


def _sentences() -> list[str]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 9, (400,), generator=generator).tolist()
    texts = [" ".join(_WORDS[i] for i in torch.randint(15, (n,), generator=generator).tolist()) for n in lengths]
    return [f"{text} {'abcdexyz'[i % 8]}{'abcdexyz'[i // 8 % 8]}{'abcdexyz'[i // 64]}." for i, text in enumerate(texts)]


SENTENCES = _sentences()  # 400 that differ
_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_XLMR = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@cache
def _wordpiece() -> str:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(SENTENCES, trainers.WordPieceTrainer(vocab_size=90, special_tokens=_BERT))
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return str(made.to_str())


def wordpiece() -> Any:
    """As BERT's, 90 pieces or fewer."""
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _BERT, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_wordpiece()), **names)


def sentencepiece(split: bool = True) -> Any:
    """As XLM-R's: pad is 1, the special tokens are pieces of the model, too."""
    pieces = [(piece, 0.0) for piece in _XLMR[:4]] + [("▁", -3.0), ("▁abc", -3.5), ("xyz", -4.2), ("ab", -4.6)]
    pieces += [(letter, -6.0 - i / 4) for i, letter in enumerate("abcdexyz.qw")] + [("▁dexy", -4.1), ("<mask>", 0.0)]
    made = Tokenizer(models.Unigram(pieces, unk_id=3))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    made.add_special_tokens([*_XLMR[:4], AddedToken("<mask>", lstrip=True, special=True)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )  # fmt: skip


def bert(tokenizer: Any, kind: str = "BertForMaskedLM", **options: Any) -> Any:
    """A random BERT of 4 blocks of width 16 for the tokenizer, in evaluation mode."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=66, **(sizes | options)
    )
    model = getattr(transformers, kind)(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zeros would hide a lost one
            torch.nn.init.normal_(parameter)
    return model


def xlmr(tokenizer: Any, kind: str = "XLMRobertaForMaskedLM", **options: Any) -> Any:
    """A random XLM-R of 4 blocks of width 16 for the tokenizer, in evaluation mode."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = transformers.XLMRobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=68, type_vocab_size=1, initializer_range=0.3, **ids,
        **(sizes | options),
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def columns(sentences: list[str]) -> str:
    """ "abc" begins an entity and "xyz" behind one is inside."""
    blocks = []
    for sentence in sentences:
        rows, before = [], "O"
        for word in sentence.split():
            before = "B-X" if word == "abc" else "I-X" if word == "xyz" and before != "O" else "O"
            rows.append(f"{word}\t{before}")
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks) + "\n"
