"""Lottery-ticket sparse fine-tuning: choose the entries that change most, train only those, keep the difference.

Sources: Ansell et al. 2022 (arXiv 2110.07560), Ansell et al. 2023 (BiStil, arXiv 2306.01709).
"""

from fastdistil.sparse.adamw import SparseAdamW
from fastdistil.sparse.delta import SparseDelta, load_into
from fastdistil.sparse.draw import random_mask
from fastdistil.sparse.files import Checkpoint
from fastdistil.sparse.mask import SparseMask
from fastdistil.sparse.select import select_topk
from fastdistil.sparse.ticket import lottery_ticket, rewind_

__all__ = [
    "Checkpoint",
    "SparseAdamW",
    "SparseDelta",
    "SparseMask",
    "load_into",
    "lottery_ticket",
    "random_mask",
    "rewind_",
    "select_topk",
]
