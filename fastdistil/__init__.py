"""fastdistil: fused, exact, memory-lean kernels for knowledge distillation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastdistil.backends import backends

if TYPE_CHECKING:
    from fastdistil import sparse, teacher
    from fastdistil.backends.memory import empty_cache
    from fastdistil.losses.attention import attention_loss
    from fastdistil.losses.hidden import hidden_loss
    from fastdistil.losses.linear_logit import linear_logit_loss
    from fastdistil.losses.linear_projected import linear_projected_logit_loss
    from fastdistil.losses.linear_topk import linear_topk_logit_loss
    from fastdistil.losses.linear_uld import linear_uld_loss
    from fastdistil.losses.logit import logit_loss
    from fastdistil.losses.projected import projected_logit_loss
    from fastdistil.losses.relation import relation_loss
    from fastdistil.losses.student_topk import student_topk_logit_loss
    from fastdistil.losses.topk import topk_logit_loss
    from fastdistil.losses.uld import uld_loss
    from fastdistil.losses.vocab_projection import VocabProjection
    from fastdistil.models.capture import capture
    from fastdistil.models.projection import tokenizer_projection
    from fastdistil.sparse import lottery_ticket

__version__ = "0.1.0"
__all__ = [
    "VocabProjection",
    "__version__",
    "attention_loss",
    "backends",
    "capture",
    "empty_cache",
    "hidden_loss",
    "linear_logit_loss",
    "linear_projected_logit_loss",
    "linear_topk_logit_loss",
    "linear_uld_loss",
    "logit_loss",
    "lottery_ticket",
    "projected_logit_loss",
    "relation_loss",
    "sparse",
    "student_topk_logit_loss",
    "teacher",
    "tokenizer_projection",
    "topk_logit_loss",
    "uld_loss",
]

# Where the names come from. They are imported when they are first used: the command line answers without torch.
_PLACES = {
    "VocabProjection": "fastdistil.losses.vocab_projection",
    "attention_loss": "fastdistil.losses.attention",
    "capture": "fastdistil.models.capture",
    "empty_cache": "fastdistil.backends.memory",
    "hidden_loss": "fastdistil.losses.hidden",
    "linear_logit_loss": "fastdistil.losses.linear_logit",
    "linear_projected_logit_loss": "fastdistil.losses.linear_projected",
    "linear_topk_logit_loss": "fastdistil.losses.linear_topk",
    "linear_uld_loss": "fastdistil.losses.linear_uld",
    "logit_loss": "fastdistil.losses.logit",
    "lottery_ticket": "fastdistil.sparse",
    "projected_logit_loss": "fastdistil.losses.projected",
    "relation_loss": "fastdistil.losses.relation",
    "student_topk_logit_loss": "fastdistil.losses.student_topk",
    "tokenizer_projection": "fastdistil.models.projection",
    "topk_logit_loss": "fastdistil.losses.topk",
    "uld_loss": "fastdistil.losses.uld",
}
_MODULES = ("sparse", "teacher")


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        found = getattr(importlib.import_module(_PLACES[name]), name)
    elif name in _MODULES:
        found = importlib.import_module(f"fastdistil.{name}")
    else:
        raise AttributeError(f"module 'fastdistil' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
