"""What a teacher says, written once and read by many trainings (docs/teacher.md).

fastdistil.teacher.write(model, loader, "runs/teacher")     # last hidden states, and the head once
store = fastdistil.teacher.open("runs/teacher")             # memory-mapped
hidden = store[17]["hidden"]                                # (tokens, D)
logits = store.head(hidden)                                 # (tokens, V)

fastdistil.teacher.write(tagger, loader, "runs/tagger", kind="layers", layers=[6])  # any layers, and its logits
cached = fastdistil.teacher.Cached(fastdistil.teacher.open("runs/tagger"), rows, collate)  # batches that hold them
"""

from fastdistil.teacher.cached import Cached
from fastdistil.teacher.store import Head, Store, open, pad
from fastdistil.teacher.write import write
from fastdistil.teacher.writer import Writer

__all__ = ["Cached", "Head", "Store", "Writer", "open", "pad", "write"]
