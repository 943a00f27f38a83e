"""The reader of the teacher's file: what it returns, and that a spoilt file is refused by name and field."""

import struct

import e5s1
import numpy as np
import pytest
import torch

from fastdistil.demo import teacher


def load(data):
    return teacher.read_teacher(data, "tiny.bin")


def tokenizer(parsed):
    return teacher.build_tokenizer(parsed.pieces, parsed.unk, bos="<s>", eos="</s>", pad="<pad>", max_length=64)


def test_reader_returns_every_tensor():
    data, seen = e5s1.write()
    parsed = load(data)
    assert parsed.header == (e5s1.HIDDEN, e5s1.LAYERS, e5s1.HEADS, e5s1.FFN, e5s1.VOCABULARY, e5s1.POSITIONS, 2)
    assert [piece for piece, _ in parsed.pieces] == e5s1.PIECES
    assert len(parsed.tensors) == len(seen) == 5 + 16 * e5s1.LAYERS
    pairs = {
        "emb.word": "embeddings.word_embeddings.weight",
        "l1.fo.w": "encoder.layer.1.output.dense.weight",
        "l0.q.b": "encoder.layer.0.attention.self.query.bias",
    }
    for short, long in pairs.items():
        assert np.array_equal(parsed.tensors[long].numpy(), seen[short])


def test_model_computes_what_the_file_says():
    data, seen = e5s1.write()
    model = teacher.build_model(load(data))
    assert not any(p.requires_grad for p in model.parameters())
    ids = torch.tensor([[0, 5, 9, 2]])
    out = model(input_ids=ids, output_hidden_states=True)
    x = (
        torch.from_numpy(seen["emb.word"])[ids]
        + torch.from_numpy(seen["emb.pos"])[:4]
        + torch.from_numpy(seen["emb.type"])[0]
    )
    x = torch.nn.functional.layer_norm(
        x, (e5s1.HIDDEN,), torch.from_numpy(seen["emb.ln.w"]), torch.from_numpy(seen["emb.ln.b"]), 1e-12
    )
    torch.testing.assert_close(out.hidden_states[0], x)
    assert out.last_hidden_state.isfinite().all()


def entry(name, **new):
    """A `change` for e5s1.write that replaces fields of one directory entry."""
    fields = ("dtype", "elements", "offset", "size")

    def change(found, *values):
        return (
            (found, *(new.get(f, v) for f, v in zip(fields, values, strict=True)))
            if found == name
            else (found, *values)
        )

    return change


HUGE = 1 << 30
SPOILT = {
    "magic": ({"header": {"magic": b"GGUF"}}, r"magic is b'GGUF', expected b'E5S1'"),
    "version": ({"header": {"version": 2}}, r"version is 2, expected 1"),
    "negative": ({"header": {"hidden": -32}}, r"hidden is -32, expected 1 to"),
    "huge": ({"header": {"ffn": HUGE}}, r"ffn is 1073741824, expected 1 to"),
    "heads": ({"header": {"heads": 5}}, r"hidden is 32, expected a multiple of the 5 heads"),
    "epsilon": ({"header": {"eps": float("nan")}}, r"layer_norm_eps is nan"),
    "block": ({"header": {"block": 64}}, r"q-block is 64, expected 32"),
    "layers": ({"header": {"layers": 1 << 24}}, r"l2\.q\.w is missing from the tensor directory"),
    "vocabulary": ({"header": {"vocabulary": 4}}, r"pieces is \d+, expected 1 to the vocabulary's 4"),
    "special": ({"special": (0, 2, 1, 9999)}, r"unk is 9999, expected 0 to"),
    "twice": ({"pieces": [*e5s1.PIECES, "a"]}, r"piece blob holds the same piece twice"),
    "utf8": ({"pieces": [*e5s1.PIECES, b"\xff"]}, r"piece blob is not UTF-8"),
    "scores": ({"scores": np.full(len(e5s1.PIECES), np.nan, "<f4")}, r"piece scores hold a value that is not finite"),
    "missing": ({"drop": "l1.aln.b"}, r"l1\.aln\.b is missing from the tensor directory"),
    "no embedding": ({"drop": "emb.word"}, r"emb\.word is missing"),
    "dtype": ({"change": entry("emb.pos", dtype=7)}, r"emb\.pos has dtype 7, expected 0 .* or 1"),
    "elements": ({"change": entry("l0.q.w", elements=5)}, r"l0\.q\.w has 5 elements, expected 1024 for shape \(32, 32\)"),
    "bytes": ({"change": entry("l0.q.b", size=4)}, r"l0\.q\.b has 4 bytes, expected 128"),
    "offset": ({"change": entry("l0.q.b", offset=1 << 62)}, r"l0\.q\.b needs 128 bytes at offset \d+, but the file ends"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_file_names_file_and_field(case):
    arguments, message = SPOILT[case]
    with pytest.raises(ValueError, match=r"^tiny\.bin: " + message):
        load(e5s1.write(**arguments)[0])


def test_every_truncation_is_a_value_error():
    data, _ = e5s1.write()
    for end in [*range(0, 1200, 7), *range(1200, len(data), 997), len(data) - 1]:
        with pytest.raises(ValueError, match=r"^tiny\.bin: .+truncated"):
            load(data[:end])


def test_flipped_bytes_never_escape_as_another_error():
    data, _ = e5s1.write()
    draw = np.random.default_rng(0)
    refused = 0
    for place in draw.integers(0, 3000, 300):
        spoilt = bytearray(data)
        spoilt[place] ^= int(draw.integers(1, 256))
        try:
            load(bytes(spoilt))
        except ValueError as error:
            refused += 1
            assert str(error).startswith("tiny.bin: ")
    assert refused > 50


def test_weight_that_is_not_finite():
    data, _ = e5s1.write()
    parsed = load(data)
    at = data.rindex(parsed.tensors["encoder.layer.1.output.LayerNorm.bias"].numpy().tobytes())
    with pytest.raises(ValueError, match=r"tiny\.bin: l1\.oln\.b holds a value that is not finite"):
        load(data[:at] + struct.pack("<f", float("inf")) + data[at + 4 :])


def test_tokenizer():
    made = tokenizer(load(e5s1.write()[0]))
    pieces = made.convert_ids_to_tokens(made("  lambalar\tana. ").input_ids)
    assert pieces == ["<s>", "\u2581lamba", "lar", "\u2581ana", ".", "</s>"]
    assert made.decode(made("lambalar ana.").input_ids, skip_special_tokens=True) == "lambalar ana."
