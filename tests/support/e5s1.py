"""Writes a tiny teacher file of the E5S1 layout, field by field, so that a test can spoil any one of them."""

import struct

import numpy as np

HIDDEN, LAYERS, HEADS, FFN, POSITIONS, TYPES = 32, 2, 4, 64, 64, 2
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
MARK = "\u2581"
LETTERS = "abcdeklmnorst"
PIECES = [*SPECIAL, *(MARK + c for c in LETTERS), *LETTERS, MARK, MARK + "lamba", "lar", MARK + "ana", ".", "<mask>"]
VOCABULARY = len(PIECES) + 3  # the real file, too, has rows beyond its pieces

SHAPES = {
    "q.w": (HIDDEN, HIDDEN),
    "q.b": (HIDDEN,),
    "k.w": (HIDDEN, HIDDEN),
    "k.b": (HIDDEN,),
    "v.w": (HIDDEN, HIDDEN),
    "v.b": (HIDDEN,),
    "ao.w": (HIDDEN, HIDDEN),
    "ao.b": (HIDDEN,),
    "aln.w": (HIDDEN,),
    "aln.b": (HIDDEN,),
    "fi.w": (FFN, HIDDEN),
    "fi.b": (FFN,),
    "fo.w": (HIDDEN, FFN),
    "fo.b": (HIDDEN,),
    "oln.w": (HIDDEN,),
    "oln.b": (HIDDEN,),
}


def q4(values):
    """Q4_0 bytes of a float array, and the float32 values that they stand for."""
    blocks = values.reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / 7).astype("<f2")
    nibbles = np.clip(np.round(blocks / np.maximum(scale.astype(np.float32), 1e-8)) + 8, 0, 15).astype(np.uint8)
    packed = nibbles[:, :16] | (nibbles[:, 16:] << 4)
    data = np.concatenate([scale.view(np.uint8).reshape(-1, 2), packed], axis=1).tobytes()
    return data, ((nibbles.astype(np.float32) - 8) * scale.astype(np.float32)).reshape(values.shape)


def tensors(seed=0):
    """{name: float32 array} of random weights, LayerNorm near 1."""
    draw = np.random.default_rng(seed)
    shapes = {
        "emb.word": (VOCABULARY, HIDDEN),
        "emb.pos": (POSITIONS, HIDDEN),
        "emb.type": (TYPES, HIDDEN),
        "emb.ln.w": (HIDDEN,),
        "emb.ln.b": (HIDDEN,),
    }
    shapes |= {f"l{n}.{name}": shape for n in range(LAYERS) for name, shape in SHAPES.items()}
    made = {name: draw.normal(size=shape).astype(np.float32) * 0.2 for name, shape in shapes.items()}
    return {name: value + (1 if name.endswith("ln.w") else 0) for name, value in made.items()}


def write(*, change=None, header=None, drop=None, pieces=None, scores=None, special=None, seed=0):
    """The file's bytes and {name: array as a reader must see it}.

    `header` replaces fields by name; `change(name, dtype, elements, offset, size)` may replace a directory entry;
    `drop` leaves a tensor out.
    """
    fields = {
        "magic": b"E5S1", "version": 1, "hidden": HIDDEN, "layers": LAYERS, "heads": HEADS, "ffn": FFN,
        "vocabulary": VOCABULARY, "positions": POSITIONS, "token_types": TYPES, "eps": 1e-12, "block": 32,
    }  # fmt: skip
    fields |= header or {}
    pieces = PIECES if pieces is None else pieces
    encoded = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]
    offsets = np.concatenate([[0], np.cumsum([len(e) for e in encoded])]).astype("<u4")
    scores = np.linspace(-1, -9, len(pieces)).astype("<f4") if scores is None else scores
    out = struct.pack("<4sI7ifi", *fields.values())
    out += struct.pack("<5iQ", len(pieces), *(special or (0, 2, 1, 3)), int(offsets[-1]))
    out += offsets.tobytes() + scores.tobytes() + b"".join(encoded)
    out += struct.pack("<iI", 0, 5) + b"\0" * 5
    seen, blobs, entries = {}, [], []
    made = {name: value for name, value in tensors(seed).items() if name != drop}
    directory_bytes = 4 + sum(2 + len(name) + 21 for name in made)
    offset = len(out) + directory_bytes
    for name, value in made.items():
        quantised = value.ndim == 2 and name not in ("emb.pos", "emb.type")
        data, seen[name] = q4(value) if quantised else (value.tobytes(), value)
        entry = (name, int(quantised), value.size, offset, len(data))
        entries.append(change(*entry) if change else entry)
        blobs.append(data)
        offset += len(data)
    out += struct.pack("<i", len(entries))
    for name, *entry in entries:
        out += struct.pack("<H", len(name)) + name.encode() + struct.pack("<BIQQ", *entry)
    return out + b"".join(blobs), seen
