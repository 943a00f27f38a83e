"""Students: narrow layers on word embeddings that are an SVD of the teacher's, or some of the teacher's own blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from fastdistil.models._check import labels_and_padding, vocabulary_rows
from fastdistil.models.block_config import check_rebuilds, configurations, cut_config
from fastdistil.models.capture import base_model, block_list


def svd_basis(table: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The best rank-`size` affine approximation of a table's rows.

    `table` (V, D) floating. Returns `mean` (D,) and `basis` (D, size), orthonormal columns by falling singular value,
    float32: row ~ mean + (row - mean) basis basisᵀ. Computed in float64 from the (D, D) Gram matrix.
    Raises ValueError where `table` is not 2-D or `size` is not within 1 to D.
    """
    if table.ndim != 2:
        raise ValueError(f"svd_basis: table has shape {tuple(table.shape)}, expected (V, D)")
    if not 1 <= size <= table.shape[1]:
        raise ValueError(f"svd_basis: size is {size}, expected 1 to {table.shape[1]}, the width of table")
    rows = table.detach().double()
    mean = rows.mean(0)
    centred = rows - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
    basis = vectors.flip(1)[:, :size]
    # A singular vector's sign is free: the largest entry is made positive, so that every machine starts alike.
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    return mean.float(), (basis * signs).float()


def _first_position(embeddings: nn.Module) -> int:
    """The row of the position table that the first token gets: 0 in BERT, pad_token_id + 1 in RoBERTa and XLM-R.

    Asked of the module itself: families differ, and neither a class nor a padding row tells.
    """
    tables: Any = embeddings
    seen: list[int] = []
    training = embeddings.training
    hook = tables.position_embeddings.register_forward_pre_hook(lambda _, inputs: seen.append(int(inputs[0].min())))
    words = tables.word_embeddings
    token = next(i for i in range(words.num_embeddings) if i not in (0, words.padding_idx))  # padding has no position
    embeddings.eval()  # dropout would draw from the generator that the student is drawn from
    try:
        with torch.no_grad():
            embeddings(input_ids=torch.full((1, 1), token, device=words.weight.device))
    finally:
        hook.remove()
        embeddings.train(training)
    return seen[0]


def _embeddings(teacher: nn.Module) -> Any:
    """The module of a BERT-like teacher's three tables. Raises TypeError where it has not all of them."""
    base = base_model(teacher, "compact_student", "teacher")
    found: Any = getattr(base, "embeddings", None)
    for table in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        if not isinstance(getattr(found, table, None), nn.Embedding):
            raise TypeError(
                f"compact_student: teacher is {type(teacher).__name__}, which has no embeddings.{table}, expected a "
                "model with embeddings like BERT's or XLM-R's"
            )
    return found


def compact_student(
    teacher: nn.Module,
    rows: Tensor,
    *,
    pad_token_id: int,
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    ffn_size: int = 512,
    labels: list[str],
    task: str = "token",
    dropout: float = 0.1,
) -> BertForTokenClassification | BertForSequenceClassification:
    """A BERT of `layers` blocks of width `hidden_size` over the teacher's vocabulary rows `rows` (V_s,) int64.

    `teacher` is any model with BERT's three embedding tables (BERT, RoBERTa, XLM-R, ...), with or without a head. Word,
    position and type embeddings are the teacher's in the basis of `svd_basis` over the kept word rows; blocks and head
    are drawn from torch's generator. `task`: "token" or "sequence" classification. float32, CPU, train mode.
    `pad_token_id` counts in the new ids. The student's positions count from 0: of XLM-R's 514 rows it has the 512 that
    tokens get.

    Raises TypeError for a teacher without one of the tables, ValueError for another task and for a `hidden_size` that
    is larger than the teacher's.
    Source: Mukherjee & Awadallah 2020 (XtremeDistil) for the embeddings, Turc et al. 2019 for the sizes.
    """
    kinds = {"token": BertForTokenClassification, "sequence": BertForSequenceClassification}
    if task not in kinds:
        raise ValueError(f"compact_student: task is {task!r}, expected one of {sorted(kinds)}")
    teacher_embeddings = _embeddings(teacher)
    positions = teacher_embeddings.position_embeddings.weight[_first_position(teacher_embeddings) :]
    types = teacher_embeddings.token_type_embeddings.weight
    words = teacher_embeddings.word_embeddings.weight.detach()
    rows = vocabulary_rows("compact_student", rows, len(words))
    labels = labels_and_padding("compact_student", labels, pad_token_id, len(rows))
    table = words[rows]  # (V_s, D_t)
    if not 1 <= hidden_size <= table.shape[1]:
        raise ValueError(
            f"compact_student: hidden_size is {hidden_size}, expected 1 to {table.shape[1]}, the width of the "
            "teacher's word embeddings"
        )
    if heads < 1 or hidden_size % heads:
        raise ValueError(f"compact_student: hidden_size is {hidden_size}, expected a multiple of heads = {heads}")
    mean, basis = svd_basis(table, hidden_size)
    config = BertConfig(
        vocab_size=len(rows),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=ffn_size,
        max_position_embeddings=len(positions),
        type_vocab_size=len(types),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=pad_token_id,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    student = kinds[task](config)
    embeddings = student.bert.embeddings
    with torch.no_grad():
        embeddings.word_embeddings.weight.copy_((table - mean) @ basis)
        embeddings.position_embeddings.weight.copy_(positions @ basis)
        embeddings.token_type_embeddings.weight.copy_((types + mean) @ basis)
    return student


def with_blocks(teacher: nn.Module, blocks: Iterable[int]) -> nn.Module:
    """A copy of `teacher` with some of its blocks alone, in this order; everything else is copied as it is.

    `teacher` is a transformers model with one list of blocks, with or without a head; `blocks` counts them from 0. What
    its configuration says block by block (layer_types, mlp_only_layers, ...) is cut, too: the student loads as it was
    saved. Raises TypeError or ValueError for a model that is none, and ValueError for a block that it does not have or
    that comes twice, and for blocks that a configuration cannot name, such as ModernBERT's without the first one, which
    has no attention norm.
    """
    base: Any = base_model(teacher, "with_blocks", "teacher")
    found = block_list(base, "with_blocks", "teacher")
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise TypeError(
            f"with_blocks: blocks is {type(blocks).__name__}, expected a list of blocks, counted from 0: range(2) are "
            "the first two"
        )
    chosen = list(blocks)
    for block in chosen:
        if isinstance(block, bool) or not isinstance(block, int):
            raise TypeError(f"with_blocks: blocks holds {block!r}, expected whole numbers")
        if not 0 <= block < len(found):
            raise ValueError(f"with_blocks: blocks holds {block}, expected 0 to {len(found) - 1}")
    if not chosen:
        raise ValueError("with_blocks: blocks is empty, expected at least one")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"with_blocks: blocks is {chosen}, expected each block once")
    kept = {id(found[block]) for block in chosen}
    # What is left out is never copied: it goes into the copy's memory as nothing.
    student = copy.deepcopy(teacher, {id(block): None for block in found if id(block) not in kept})
    path = next(name for name, module in teacher.named_modules() if module is found)
    copies: Any = student.get_submodule(path)
    parent, _, name = path.rpartition(".")
    setattr(student.get_submodule(parent), name, nn.ModuleList([copies[block] for block in chosen]))
    student_base: Any = base_model(student, "with_blocks")
    cut_config(student_base.config, chosen, len(found))
    check_rebuilds(base, base.config, student_base.config, chosen, "with_blocks")
    for index, block_copy in enumerate(student.get_submodule(path).children()):
        for module in cast("Iterable[Any]", block_copy.modules()):
            for number in ("layer_idx", "layer_id"):  # where a decoder's block keeps its keys and values
                if hasattr(module, number):
                    setattr(module, number, index)
    return student


def without_dropout(model: nn.Module) -> None:
    """Set every dropout of `model` to 0 in place: modules, plain attributes, and the configuration, from which some
    models read it while they run and all of them when they are loaded."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    holders = [*model.modules(), *configurations(model)]
    for holder in holders:
        for name, value in list(vars(holder).items()):
            if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
                setattr(holder, name, 0.0)
