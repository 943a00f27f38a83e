"""Running a transformers model over a loader, and writing what it says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.fingerprint import of_teacher
from fastdistil.teacher import format as files
from fastdistil.teacher.store import Store, open
from fastdistil.teacher.writer import Writer

_NAME = "teacher.write"
_BLOCK = 1 << 22  # logits whose float64 copies are in memory at a time


def write(
    model: nn.Module,
    loader: Iterable[Mapping[str, Tensor]],
    path: str | Path,
    *,
    kind: str = "hidden",
    layers: Sequence[int] = (),
    logits: bool = True,
    k: int = 64,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
    name: str | None = None,
    shard_bytes: int = 256 << 20,
    progress: bool = True,
) -> Store:
    """Run `model` over `loader` under no_grad and write a store; cut off and called again, it continues.

    Examples that are there already are not computed again, but `loader` is read from its beginning: it must give the
    same examples in the same order.

    Args:
        model: a transformers model on its device; it is in eval mode and without a cache while this runs. Of kind
            "hidden" and "topk" with a linear head (get_output_embeddings, or the `classifier` or `score` of a token
            classifier, whose V is its classes), such as AutoModelForMaskedLM's, AutoModelForCausalLM's or
            AutoModelForTokenClassification's. Of kind "layers" one that `fastdistil.capture` reads, with a head that
            classifies tokens or whole sequences, or without one.
        loader: batches for model(**batch): at least input_ids (B, S); where attention_mask (B, S) is 0, nothing is
            written. Not labels.
        path: the store's folder.
        kind: "hidden": what the head is applied to, and the head once, from which any divergence follows later;
            "topk": the K largest log-probabilities of softmax(logits / temperature), their columns, and the logarithm
            of what all others have together, each in float64 before it is rounded to what is kept. A store that was
            begun without those is continued without them. "layers": the input ids, the hidden states of `layers` and,
            where `logits`, the model's logits, (tokens, C) or (C,), all from one pass.
        layers: of kind "layers", counted as `fastdistil.capture` counts them: 0 is what the first block gets, l the
            output of block l; negative ones from the end, -1 the last block's.
        logits: of kind "layers".
        k, temperature: of kind "topk".
        dtype: of what is written; by default the hidden states' own, and float32 for values. Logits are kept in float32
            (float64 where it is that).
        name: the teacher's name in the index, by default model.config.name_or_path.
        shard_bytes: see Writer.
        progress: whether a progress bar is shown.

    Returns:
        The store, opened.

    Raises:
        ValueError: where the model has no linear head, or its logits are not that head's (a cap or a scale on top: use
            kind "topk"); of kind "layers", a layer that the model does not have, and a loader that gives other examples
            than those that are written; and Writer's errors.
        KeyboardInterrupt: after Ctrl-C, once the examples that were computed are written.

    Example:
        >>> import tempfile, torch, fastdistil
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = BertForMaskedLM(BertConfig(vocab_size=30, **sizes))
        >>> mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        >>> loader = [{"input_ids": torch.arange(10).view(2, 5), "attention_mask": mask}]  # any batches
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = fastdistil.teacher.write(model, loader, folder.name, kind="topk", k=4, progress=False)
        >>> [store.length(i) for i in range(len(store))], sorted(store[1])
        ([5, 3], ['indices', 'tail', 'values'])
        >>> folder.cleanup()
    """
    if kind == "layers":
        return _write_layers(model, loader, Path(path), layers, logits, dtype, name, shard_bytes, progress)
    if len(layers):
        raise ValueError(f"{_NAME}: layers came with kind={kind!r}, expected kind='layers'")
    head = _head(model)
    weight: Tensor = head.weight
    hidden_kind = kind == "hidden"
    config: Any = getattr(model, "config", None)
    tail = not hidden_kind and _keeps_tails(Path(path))
    writer = Writer(
        path,
        kind=kind,
        width=weight.shape[1] if hidden_kind else k,
        vocabulary=weight.shape[0],
        model=str(getattr(config, "name_or_path", "")) if name is None else name,
        dtype=dtype if dtype is not None else weight.dtype if hidden_kind else torch.float32,
        temperature=1.0 if hidden_kind else temperature,
        tail=tail,
        head_weight=weight if hidden_kind else None,
        head_bias=getattr(head, "bias", None) if hidden_kind else None,
        shard_bytes=shard_bytes,
    )
    with writer, _evaluating(model), _written_at_interrupt(writer), torch.no_grad():
        for batch in _remaining(loader, writer.examples, progress):
            for example in _examples(model, head, batch, kind, k, temperature):
                if not tail:
                    example.pop(files.TAIL, None)
                writer.add(**example)
    return open(path)


@contextmanager
def _written_at_interrupt(writer: Writer) -> Iterator[None]:
    """Ctrl-C loses no example that was computed."""
    try:
        yield
    except KeyboardInterrupt:
        writer.flush()
        raise


def _write_layers(
    model: nn.Module,
    loader: Iterable[Mapping[str, Tensor]],
    path: Path,
    layers: Sequence[int],
    logits: bool,
    dtype: torch.dtype | None,
    name: str | None,
    shard_bytes: int,
    progress: bool,
) -> Store:
    """`write` of kind "layers"."""
    from fastdistil.teacher import layers as reading

    numbers = reading.layer_numbers(model, layers)
    with _evaluating(model), torch.no_grad():
        writer = Writer(
            path,
            kind="layers",
            **reading.shapes(model, numbers, logits),
            model=str(getattr(getattr(model, "config", None), "name_or_path", "")) if name is None else name,
            dtype=next(model.parameters()).dtype if dtype is None else dtype,
            layers=numbers,
            teacher=of_teacher(model),
            shard_bytes=shard_bytes,
        )
        written = Store(path)
        check = reading.Skipped(written, writer.examples)
        with writer, _written_at_interrupt(writer):
            for batch in _remaining(loader, writer.examples, progress, check):
                for example in reading.examples(model, batch, numbers, logits):
                    writer.add(**example)
    return open(path)


def _head(model: nn.Module) -> Any:
    """The last linear layer: over the vocabulary, or over the classes of a token classifier."""
    get_head = getattr(model, "get_output_embeddings", None)
    heads = [
        get_head() if callable(get_head) else None,
        getattr(model, "classifier", None),
        getattr(model, "score", None),
    ]
    for head in heads:
        if isinstance(getattr(head, "weight", None), Tensor):
            return head
    if isinstance(model, str):
        raise TypeError(
            f"{_NAME}: model is str, expected a transformers model (AutoModelForMaskedLM.from_pretrained(...) loads "
            "one by its name)"
        )
    raise ValueError(
        f"{_NAME}: model is {type(model).__name__}, which has no output embeddings and no linear classifier, expected "
        "one with either (kind='layers' needs none)"
    )


def _keeps_tails(path: Path) -> bool:
    """Of a store of kind "topk": unless version 1 began it, whose shards have none."""
    if not (path / files.INDEX).is_file():
        return True
    found = files.read_index(path)
    if not found.tail and not found.complete:
        warnings.warn(
            f"{_NAME}: {path} was begun without the tails' mass (version 1) and is continued without it",
            stacklevel=3,
        )
    return found.tail


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without a cache: with one, transformers lets the sequences of a packed row, which their
    position_ids tell apart, attend to each other."""
    from fastdistil.models.block_config import configurations  # imports transformers, which readers do without

    training = model.training
    caching = [config for config in configurations(model) if getattr(config, "use_cache", False)]
    model.eval()
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        model.train(training)
        for config in caching:
            config.use_cache = True


def _remaining(
    loader: Iterable[Mapping[str, Tensor]],
    done: int,
    progress: bool,
    skipped: Callable[[Mapping[str, Tensor], int], None] | None = None,
) -> Iterator[Mapping[str, Tensor]]:
    """The loader's batches without its first `done` examples; `skipped` is told of those."""
    from tqdm import tqdm

    seen = 0
    total = len(loader) if isinstance(loader, Sized) else None
    for batch in tqdm(loader, total=total, desc="teacher", unit="batch", disable=None if progress else True):
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"{_NAME}: loader gave a batch that is {type(batch).__name__}, expected a mapping with input_ids"
            )
        if "input_ids" not in batch:
            raise ValueError(f"{_NAME}: loader gave a batch of {sorted(batch)}, expected input_ids among them")
        for key, x in batch.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"{_NAME}: loader gave a batch whose {key} is {type(x).__name__}, expected tensors")
        size = batch["input_ids"].shape[0]
        skip = min(max(done - seen, 0), size)
        if skip and skipped is not None:
            skipped({key: x[:skip] for key, x in batch.items()}, seen)
        seen += size
        if skip < size:
            yield {key: x[skip:] for key, x in batch.items()}
    if seen < done:
        raise ValueError(f"{_NAME}: loader gave {seen} examples, the store holds {done} already")


def _examples(
    model: nn.Module, head: Any, batch: Mapping[str, Tensor], kind: str, k: int, temperature: float
) -> Iterator[dict[str, Tensor]]:
    """What the store keeps of each example of a batch."""
    device = next(chain(model.parameters(), model.buffers())).device
    batch = {key: x.to(device) for key, x in batch.items()}
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    caught: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        logits = model(**batch).logits
    finally:
        hook.remove()
    if logits.shape[:-1] != mask.shape:
        raise ValueError(
            f"{_NAME}: model gave logits {tuple(logits.shape)} for {tuple(mask.shape)} tokens, expected some of each"
        )
    if kind == "hidden":
        if len(caught) != 1 or caught[0].shape[:-1] != mask.shape:
            raise ValueError(f"{_NAME}: model ran its head {len(caught)} times, expected once, on every token")
        at = logits.amax(-1).masked_fill(~mask, -torch.inf).argmax()  # where a cap would show most
        _check_head(head, caught[0].flatten(0, 1)[at], logits.flatten(0, 1)[at])
    for row, keep in enumerate(mask):
        if kind == "hidden":
            yield {"hidden": caught[0][row][keep]}
        else:
            yield _largest(logits[row][keep], k, temperature)


def _largest(logits: Tensor, k: int, temperature: float) -> dict[str, Tensor]:
    """Of logits (tokens, V): the K largest log-probabilities of softmax(logits / temperature), their columns and
    the logarithm of the others' mass, the sum over the others themselves. Some rows at a time, in float64 where the
    device has it."""
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    found = []
    for rows in torch.split(logits, max(1, _BLOCK // logits.shape[-1])):
        indices = rows.topk(k).indices
        z = (rows.to(wide) - rows.amax(-1, keepdim=True)) / temperature
        known = z.gather(-1, indices)
        rest = z.scatter(-1, indices, -torch.inf).logsumexp(-1)
        whole = torch.logaddexp(known.logsumexp(-1), rest)
        found.append((known - whole[:, None], indices, rest - whole))
    values, indices, tail = (torch.cat(x) for x in zip(*found, strict=True))
    return {"values": values, "indices": indices, files.TAIL: tail}


def _check_head(head: Any, hidden: Tensor, logits: Tensor) -> None:
    """The logits are the head's output and nothing else."""
    found = nn.functional.linear(hidden, head.weight, getattr(head, "bias", None))
    if found.shape != logits.shape or not torch.allclose(found.float(), logits.float(), rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"{_NAME}: the model's logits are not its head's output (a cap, a scale or a cut on top), expected that; "
            "use kind='topk'"
        )
