"""The teacher's file (magic E5S1: multilingual-e5-small in blocks of four bits) as a transformers BertModel.

Layout, little endian: magic, u32 version; 7 x i32 hidden, layers, heads, FFN, vocabulary, positions, token types; f32
LayerNorm epsilon; i32 block; 5 x i32 pieces, bos, eos, pad, unk; u64 blob length; u32 offsets[pieces + 1];
f32 scores[pieces]; the UTF-8 blob of pieces; i32, u32 n, n bytes of normaliser map; i32 tensors, each: u16 name length,
name, u8 dtype (0 float32, 1 Q4_0), u32 elements, u64 offset in the file, u64 bytes. A Q4_0 block is one float16 scale
and 16 bytes: 32 weights, the low nibbles then the high ones, minus 8, times the scale.

Every length is checked against the file before anything is allocated for it; an error names the file and the field.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

MAGIC = b"E5S1"
VERSION = 1
BLOCK = 32  # weights in one Q4_0 block
BLOCK_BYTES = 18  # one float16 scale and 16 bytes of nibbles
MAX_DIMENSION = 1 << 24  # no size of a real encoder comes near; keeps the products below exact and small

# Name in the file, name in transformers' BertModel, shape by header field; the w of linear layers is in Q4_0.
_EMBEDDINGS = (
    ("emb.word", "embeddings.word_embeddings.weight", ("vocabulary", "hidden")),
    ("emb.pos", "embeddings.position_embeddings.weight", ("positions", "hidden")),
    ("emb.type", "embeddings.token_type_embeddings.weight", ("token_types", "hidden")),
    ("emb.ln.w", "embeddings.LayerNorm.weight", ("hidden",)),
    ("emb.ln.b", "embeddings.LayerNorm.bias", ("hidden",)),
)
_LAYER = (
    ("q.w", "attention.self.query.weight", ("hidden", "hidden")),
    ("q.b", "attention.self.query.bias", ("hidden",)),
    ("k.w", "attention.self.key.weight", ("hidden", "hidden")),
    ("k.b", "attention.self.key.bias", ("hidden",)),
    ("v.w", "attention.self.value.weight", ("hidden", "hidden")),
    ("v.b", "attention.self.value.bias", ("hidden",)),
    ("ao.w", "attention.output.dense.weight", ("hidden", "hidden")),
    ("ao.b", "attention.output.dense.bias", ("hidden",)),
    ("aln.w", "attention.output.LayerNorm.weight", ("hidden",)),
    ("aln.b", "attention.output.LayerNorm.bias", ("hidden",)),
    ("fi.w", "intermediate.dense.weight", ("ffn", "hidden")),
    ("fi.b", "intermediate.dense.bias", ("ffn",)),
    ("fo.w", "output.dense.weight", ("hidden", "ffn")),
    ("fo.b", "output.dense.bias", ("hidden",)),
    ("oln.w", "output.LayerNorm.weight", ("hidden",)),
    ("oln.b", "output.LayerNorm.bias", ("hidden",)),
)


class Header(NamedTuple):
    """Sizes of the encoder, in elements."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int
    positions: int
    token_types: int


@dataclass(frozen=True)
class TeacherFile:
    """What the file holds: sizes, pieces with scores in id order, special ids, float32 tensors by BertModel's names."""

    header: Header
    layer_norm_eps: float
    pieces: list[tuple[str, float]]
    bos: int
    eos: int
    pad: int
    unk: int
    tensors: dict[str, torch.Tensor]


class _Cursor:
    """Reads forward through the bytes; a field that runs past the end is a ValueError naming the file and the field."""

    def __init__(self, data: bytes, name: str) -> None:
        self.data, self.name, self.at = data, name, 0

    def error(self, field: str, message: str) -> ValueError:
        return ValueError(f"{self.name}: {field} {message}")

    def take(self, count: int, field: str) -> memoryview:
        if count < 0 or count > len(self.data) - self.at:
            raise self.error(
                field, f"needs {count} bytes at offset {self.at}, but the file ends at {len(self.data)}: truncated?"
            )
        self.at += count
        return memoryview(self.data)[self.at - count : self.at]

    def unpack(self, layout: str, field: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout), field))

    def array(self, dtype: str, count: int, field: str) -> np.ndarray[Any, np.dtype[Any]]:
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize, field), dtype)


def _header(cursor: _Cursor) -> tuple[Header, float]:
    magic = bytes(cursor.take(4, "magic"))
    if magic != MAGIC:
        raise cursor.error("magic", f"is {magic!r}, expected {MAGIC!r}")
    (version,) = cursor.unpack("I", "version")
    if version != VERSION:
        raise cursor.error("version", f"is {version}, expected {VERSION}")
    header = Header(*cursor.unpack("7i", "header"))
    for field, value in header._asdict().items():
        if not 0 < value <= MAX_DIMENSION:
            raise cursor.error(field, f"is {value}, expected 1 to {MAX_DIMENSION}")
    if header.hidden % header.heads:
        raise cursor.error("hidden", f"is {header.hidden}, expected a multiple of the {header.heads} heads")
    epsilon, block = cursor.unpack("fi", "layer_norm_eps and q-block")
    if not (math.isfinite(epsilon) and 0 < epsilon < 1):
        raise cursor.error("layer_norm_eps", f"is {epsilon}, expected a number between 0 and 1")
    if block != BLOCK:
        raise cursor.error("q-block", f"is {block}, expected {BLOCK}")
    return header, epsilon


def _pieces(cursor: _Cursor, header: Header) -> tuple[list[tuple[str, float]], tuple[int, int, int, int]]:
    count, *special = cursor.unpack("5i", "pieces and special ids")
    if not 0 < count <= header.vocabulary:
        raise cursor.error("pieces", f"is {count}, expected 1 to the vocabulary's {header.vocabulary}")
    for field, value in zip(("bos", "eos", "pad", "unk"), special, strict=True):
        if not 0 <= value < count:
            raise cursor.error(field, f"is {value}, expected 0 to {count - 1}")
    (length,) = cursor.unpack("Q", "blob length")
    offsets = cursor.array("<u4", count + 1, "piece offsets").astype(np.int64)
    scores = cursor.array("<f4", count, "piece scores")
    blob = bytes(cursor.take(length, "piece blob"))
    if offsets[0] != 0 or offsets[-1] != length or (np.diff(offsets) < 0).any():
        raise cursor.error("piece offsets", f"do not ascend from 0 to the blob's {length} bytes")
    if not np.isfinite(scores).all():
        raise cursor.error("piece scores", "hold a value that is not finite")
    try:
        pieces = [(blob[a:b].decode(), float(s)) for a, b, s in zip(offsets[:-1], offsets[1:], scores, strict=True)]
    except UnicodeDecodeError as error:
        raise cursor.error("piece blob", f"is not UTF-8: {error}") from error
    if len({piece for piece, _ in pieces}) != count:
        raise cursor.error("piece blob", "holds the same piece twice")
    bos, eos, pad, unk = special
    return pieces, (bos, eos, pad, unk)


def _tensor(cursor: _Cursor, name: str, shape: tuple[int, ...], entry: tuple[int, int, int, int]) -> torch.Tensor:
    """One float32 tensor of `shape` from its directory entry (dtype, elements, offset, bytes)."""
    dtype, elements, offset, length = entry
    if elements != math.prod(shape):
        raise cursor.error(name, f"has {elements} elements, expected {math.prod(shape)} for shape {shape}")
    if dtype not in (0, 1):
        raise cursor.error(name, f"has dtype {dtype}, expected 0 (float32) or 1 (Q4_0)")
    if dtype == 1 and elements % BLOCK:
        raise cursor.error(name, f"has {elements} elements, expected a multiple of {BLOCK} for Q4_0")
    expected = elements * 4 if dtype == 0 else elements // BLOCK * BLOCK_BYTES
    if length != expected:
        raise cursor.error(name, f"has {length} bytes, expected {expected} for {elements} elements of dtype {dtype}")
    if offset > len(cursor.data) - length:
        raise cursor.error(
            name, f"needs {length} bytes at offset {offset}, but the file ends at {len(cursor.data)}: truncated?"
        )
    raw = np.frombuffer(cursor.data, np.uint8, length, offset)
    if dtype == 0:
        values = raw.view("<f4").astype(np.float32)
    else:
        blocks = raw.reshape(-1, BLOCK_BYTES)
        scale = blocks[:, :2].copy().view("<f2").astype(np.float32)  # (blocks, 1)
        nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)  # (blocks, 32)
        values = (nibbles.astype(np.float32) - 8) * scale
    if not np.isfinite(values).all():
        raise cursor.error(name, "holds a value that is not finite")
    return torch.from_numpy(values.reshape(shape))


def read_teacher(data: bytes, name: str = "e5-small-q4.bin") -> TeacherFile:
    """Parse the file's bytes. `name` is what errors call the file.

    Raises ValueError naming the file and the field where anything is truncated, inconsistent, missing or not finite.
    """
    cursor = _Cursor(data, name)
    header, epsilon = _header(cursor)
    pieces, (bos, eos, pad, unk) = _pieces(cursor, header)
    _, map_bytes = cursor.unpack("iI", "normaliser map")
    cursor.take(map_bytes, "normaliser map")
    (count,) = cursor.unpack("i", "tensor count")
    directory: dict[str, tuple[int, int, int, int]] = {}
    for index in range(count):
        (length,) = cursor.unpack("H", f"tensor {index}: name length")
        tensor_name = bytes(cursor.take(length, f"tensor {index}: name")).decode("utf-8", "replace")
        if tensor_name in directory:
            raise cursor.error(tensor_name, "is in the tensor directory twice")
        dtype, elements, offset, size = cursor.unpack("BIQQ", f"{tensor_name}: directory entry")
        directory[tensor_name] = (dtype, elements, offset, size)
    wanted = {short: (long, shape) for short, long, shape in _EMBEDDINGS}
    for layer in range(header.layers):
        for short, long, shape in _LAYER:
            if f"l{layer}.{short}" not in directory:  # before the table grows with a hostile layer count
                raise cursor.error(f"l{layer}.{short}", "is missing from the tensor directory")
            wanted[f"l{layer}.{short}"] = (f"encoder.layer.{layer}.{long}", shape)
    sizes = header._asdict()
    tensors: dict[str, torch.Tensor] = {}
    for short, (long, fields) in wanted.items():
        if short not in directory:
            raise cursor.error(short, "is missing from the tensor directory")
        tensors[long] = _tensor(cursor, short, tuple(sizes[field] for field in fields), directory[short])
    return TeacherFile(header, epsilon, pieces, bos, eos, pad, unk, tensors)


def build_model(teacher: TeacherFile) -> BertModel:
    """The encoder as a frozen float32 transformers BertModel in eval mode, without pooler."""
    header = teacher.header
    config = BertConfig(
        vocab_size=header.vocabulary,
        hidden_size=header.hidden,
        num_hidden_layers=header.layers,
        num_attention_heads=header.heads,
        intermediate_size=header.ffn,
        max_position_embeddings=header.positions,
        type_vocab_size=header.token_types,
        layer_norm_eps=teacher.layer_norm_eps,
        pad_token_id=teacher.pad,
    )
    with torch.device("meta"):  # no random initialisation of 118M parameters that are overwritten at once
        model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(teacher.tensors, strict=True, assign=True)
    for name, buffer in list(model.embeddings.named_buffers()):
        fill = torch.arange(header.positions) if name == "position_ids" else torch.zeros(header.positions)
        model.embeddings.register_buffer(name, fill.to(buffer.dtype).reshape(buffer.shape), persistent=False)
    return model.requires_grad_(False).eval()


def build_tokenizer(
    pieces: list[tuple[str, float]], unk: int, *, bos: str, eos: str, pad: str, max_length: int
) -> PreTrainedTokenizerFast:
    """A transformers tokenizer around a Unigram model of (piece, score) in id order: XLM-R's normaliser, markers,
    and mask where that is one of the pieces."""
    tokenizer = Tokenizer(Unigram(pieces, unk_id=unk, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex("[\u0001-\u0008\u000b\u000e-\u001f\u007f\u008f\u009f]"), ""),
            normalizers.NFKC(),
            normalizers.Replace(Regex("[\\s\u200b-\u200f\u2581\ufeff\ufffd]+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    ids = {token: index for index, (token, _) in enumerate(pieces)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, ids[bos]), (eos, ids[eos])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        cls_token=bos,
        sep_token=eos,
        pad_token=pad,
        unk_token=pieces[unk][0],
        mask_token="<mask>" if "<mask>" in ids else None,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
