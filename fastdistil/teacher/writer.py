"""Writing a store: one example after the other, a shard at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from fastdistil.losses._check import no_tensor, positive
from fastdistil.ops.topk_teacher import LARGEST_MASS
from fastdistil.teacher import format as files
from fastdistil.writing import Folder, naming

_NAME = "teacher.Writer"
_TOKENS = -1  # stands for the number of tokens in a shape


class Writer:
    """Writes a store, or goes on with one that was cut off.

        with Writer("runs/teacher", kind="topk", width=64, vocabulary=119_547, model="mbert") as writer:
            for values, indices in examples[writer.examples :]:
                writer.add(values=values, indices=indices)

    Leaving the block without an error writes the last shard and marks the store as complete; with an error, or killed,
    the complete shards stay, and a Writer with the same arguments continues after them: `examples` says from where.

    Args:
        path: a folder; it is made where it does not exist.
        kind: "hidden" (what the head is applied to; needs head_weight), "topk" or "layers" (hidden states of some
            layers, and logits).
        width: D or K; vocabulary: V, or of kind "layers" the number of classes; 0 where there are no layers, no logits.
        model: the teacher's name, kept in the index.
        dtype: of hidden states or values: torch.float32, bfloat16, float16 or float64; what is added is rounded to it.
        temperature: that the values were made at, kept in the index.
        tail: of kind "topk": each example comes with `tail` (tokens,) float32 or float64, the natural logarithm of the
            mass of all columns but its indices, which topk_logit_loss takes as teacher_tail. It is kept in float32, in
            float64 where `dtype` is.
        layers, logits, teacher: of kind "layers": the layers, ascending from 0; "tokens" where each token has logits,
            "examples" where each example has, "" for none; and a hash of the teacher, with which alone it is continued.
            An example comes with `input_ids` (tokens,), `hidden_<layer>` (tokens, D) and `logits` (tokens, C) or (C,).
        head_weight, head_bias: (V, D) and optionally (V,), kept once, in their own dtype.
        shard_bytes: a shard is written when its tensors reach this size, which bounds the memory in use.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted; where the folder holds a complete
            store, one of other settings, or damaged files.
        RuntimeError: where another Writer writes to the folder.
        OSError: naming the file, where it cannot be written: what was written before stays.

    Example:
        >>> import tempfile, torch, fastdistil
        >>> folder = tempfile.TemporaryDirectory()
        >>> head = {"vocabulary": 5, "head_weight": torch.ones(5, 3)}
        >>> with fastdistil.teacher.Writer(folder.name, kind="hidden", width=3, **head) as writer:
        ...     writer.add(hidden=torch.zeros(4, 3))
        ...     writer.add(hidden=torch.zeros(2, 3))
        ...
        >>> store = fastdistil.teacher.open(folder.name)
        >>> len(store), store.length(1)
        (2, 2)
        >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | Path,
        *,
        kind: str,
        width: int,
        vocabulary: int,
        model: str = "",
        dtype: torch.dtype = torch.float32,
        temperature: float = 1.0,
        tail: bool = False,
        layers: Sequence[int] = (),
        logits: str = "",
        teacher: str = "",
        head_weight: Tensor | None = None,
        head_bias: Tensor | None = None,
        shard_bytes: int = 256 << 20,
    ) -> None:
        names = {torch_dtype: name for name, torch_dtype in files.DTYPES.items()}
        if kind not in files.FIELDS:
            raise ValueError(f"{_NAME}: kind is {kind!r}, expected 'hidden', 'topk' or 'layers'")
        if dtype not in names:
            raise ValueError(
                f"{_NAME}: dtype is {dtype}, expected torch.float32, torch.bfloat16, torch.float16 or torch.float64"
            )
        _check_layers(kind, layers, logits)
        unused = {"width": kind == "layers" and not layers, "vocabulary": kind == "layers" and not logits}
        for name, value in (("width", width), ("vocabulary", vocabulary), ("shard_bytes", shard_bytes)):
            least = 0 if unused.get(name) else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{_NAME}: {name} is {value!r}, expected an integer of at least {least}")
        if kind == "topk" and width > vocabulary:
            raise ValueError(f"{_NAME}: width is {width}, expected at most the vocabulary, {vocabulary}")
        if not isinstance(tail, bool):
            raise TypeError(f"{_NAME}: tail is {type(tail).__name__}, expected a bool (the tails go to add())")
        if tail and kind != "topk":
            raise ValueError(f"{_NAME}: tail came with kind={kind!r}, expected kind='topk'")
        self.path, self._shard_bytes = Path(path), shard_bytes
        self._index = files.Index(
            kind,
            model,
            names[dtype],
            width,
            vocabulary,
            positive(_NAME, "temperature", temperature),
            tail,
            list(layers),
            logits,
            teacher,
        )
        self._buffer: list[dict[str, Tensor]] = []
        self._buffered_bytes = 0
        head = self._head(head_weight, head_bias)
        with naming(self.path):
            self._lock = Folder(self.path, _NAME)
        try:
            self._begin(head)
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, head: dict[str, Tensor]) -> None:
        """The folder as it is: new, or to be continued."""
        for left in self.path.glob(files.PARTIAL + "*"):
            left.unlink()
        if (self.path / files.INDEX).exists():
            self._resume(head)
        else:
            if {path.name for path in self.path.iterdir()} - {files.HEAD}:  # the head alone: it was cut off behind that
                raise ValueError(f"{_NAME}: {self.path} is not empty and holds no store, expected another folder")
            if head:
                self._index.head = files.save(self.path / files.HEAD, head)
            files.write_index(self.path, self._index)

    @property
    def examples(self) -> int:
        """How many are written or waiting for their shard: after a resume, where to continue."""
        return self._index.examples + len(self._buffer)

    def _head(self, weight: Tensor | None, bias: Tensor | None) -> dict[str, Tensor]:
        index = self._index
        if index.kind != "hidden":
            if weight is not None or bias is not None:
                raise ValueError(f"{_NAME}: head_weight came with kind={index.kind!r}, expected None")
            return {}
        expected = (index.vocabulary, index.width)
        if weight is None or tuple(weight.shape) != expected:
            found = "None" if weight is None else f"of shape {tuple(weight.shape)}"
            raise ValueError(f"{_NAME}: head_weight is {found}, expected {expected} with kind='hidden'")
        if bias is not None and tuple(bias.shape) != expected[:1]:
            raise ValueError(f"{_NAME}: head_bias has shape {tuple(bias.shape)}, expected {expected[:1]}")
        return {name: x.detach().cpu() for name, x in (("weight", weight), ("bias", bias)) if x is not None}

    def _resume(self, head: dict[str, Tensor]) -> None:
        found = files.read_index(self.path)
        if found.complete:
            raise ValueError(f"{_NAME}: {self.path} holds a complete store, expected another folder")
        for name, value in self._index.settings().items():
            if (before := getattr(found, name)) != value:
                raise ValueError(f"{_NAME}: {self.path} was begun with {name} = {before!r}, this writer has {value!r}")
        for file in (found.head, *found.shards):
            if file is not None:
                files.check_file(self.path, file, contents=True)
        if head:
            files.check_head(self.path, head)
        self._index = found

    def add(self, **example: Tensor) -> None:
        """One example: hidden (tokens, D), or values and indices (tokens, K) and, of a Writer with tails, tail
        (tokens,)."""
        index = self._index
        if set(example) != set(index.fields):
            raise TypeError(f"{_NAME}.add: got {sorted(example)}, expected {', '.join(index.fields)}")
        for name, x in example.items():
            if not isinstance(x, Tensor):
                raise no_tensor(f"{_NAME}.add", name, x)
        first = example[index.fields[0]]
        tokens = first.shape[0] if first.dim() == len(index.shape(index.fields[0], 0)) else -1
        kept = {}
        for name, x in example.items():
            if tuple(x.shape) != index.shape(name, tokens):
                sizes = ["tokens" if size == _TOKENS else str(size) for size in index.shape(name, _TOKENS)]
                wanted = f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
                raise ValueError(
                    f"{_NAME}.add: {name} has shape {tuple(x.shape)}, expected {wanted}"
                    + (" of one example" if x.dim() == 3 else "")
                )
            dtype = index.torch_dtype(name)
            if x.dtype.is_floating_point == (name in files.INTEGERS):
                raise TypeError(f"{_NAME}.add: {name} has dtype {x.dtype}, expected one like {dtype}")
            if name == files.TAIL and x.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{_NAME}.add: tail has dtype {x.dtype}, expected float32 or float64")
            kept[name] = x.detach().to("cpu", dtype, copy=True)
            if dtype == torch.float16 and bool((kept[name].isinf() & x.detach().isfinite().cpu()).any()):
                largest = float(x.abs().max())
                raise ValueError(f"{_NAME}.add: {name} holds {largest:.4g}, too large for float16; use bfloat16")
        columns = kept.get("indices")
        if columns is not None and bool((outside := (columns < 0) | (columns >= index.vocabulary)).any()):
            raise ValueError(
                f"{_NAME}.add: indices holds {int(columns[outside][0])}, expected 0 to {index.vocabulary - 1}"
            )
        if index.tail:
            _check_mass(example["values"], example[files.TAIL])
        self._buffer.append(kept)
        self._buffered_bytes += sum(x.nbytes for x in kept.values())
        if self._buffered_bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """What is waiting becomes a shard."""
        if not self._buffer:
            return
        index = self._index
        lengths = [x[index.fields[0]].shape[0] for x in self._buffer]
        join = {name: torch.stack if index.by_example(name) else torch.cat for name in index.fields}
        tensors = {name: join[name]([x[name] for x in self._buffer]) for name in index.fields}
        tensors["offsets"] = torch.tensor([0, *lengths]).cumsum(0)
        path = self.path / f"shard-{len(self._index.shards):05d}.safetensors"
        self._index.shards.append(files.save(path, tensors, len(lengths), sum(lengths)))
        try:
            files.write_index(self.path, self._index)
        except BaseException:
            self._index.shards.pop()  # which is written again
            raise
        self._buffer, self._buffered_bytes = [], 0

    def close(self) -> None:
        """Writes the last shard and marks the store as complete."""
        self.flush()
        self._index.complete = True
        files.write_index(self.path, self._index)
        self._lock.release()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._lock.release()


def _check_layers(kind: str, layers: Sequence[int], logits: str) -> None:
    """What a store of kind "layers" is told, and other kinds are not."""
    if kind != "layers":
        for name, value in (("layers", layers), ("logits", logits)):
            if value:
                raise ValueError(f"{_NAME}: {name} came with kind={kind!r}, expected kind='layers'")
        return
    if list(layers) != sorted(set(layers)) or any(layer < 0 for layer in layers):
        raise ValueError(f"{_NAME}: layers is {list(layers)}, expected ascending numbers from 0, each once")
    if logits not in ("tokens", "examples", ""):
        raise ValueError(f"{_NAME}: logits is {logits!r}, expected 'tokens', 'examples' or ''")
    if not layers and not logits:
        raise ValueError(f"{_NAME}: layers is empty and logits is '', expected something to write")


def _check_mass(values: Tensor, tail: Tensor) -> None:
    """A tail that is no logarithm, or of another temperature, would show in training alone."""
    mass = values.double().exp().sum(-1) + tail.double().exp()
    wrong = ((mass - 1).abs() > LARGEST_MASS - 1) & (values != -torch.inf).any(-1)
    if bool(wrong.any()):
        token = int(wrong.nonzero()[0])
        raise ValueError(
            f"{_NAME}.add: values and tail have probabilities that sum to {float(mass[token]):.4g} in token {token}, "
            "expected 1: tail is the natural logarithm of what the other columns have together"
        )
