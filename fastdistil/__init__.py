"""fastdistil: fused, exact, memory-lean kernels for knowledge distillation."""

from fastdistil import teacher
from fastdistil.backends import backends
from fastdistil.backends.memory import empty_cache
from fastdistil.losses.attention import attention_loss
from fastdistil.losses.hidden import hidden_loss
from fastdistil.losses.linear_logit import linear_logit_loss
from fastdistil.losses.linear_topk import linear_topk_logit_loss
from fastdistil.losses.logit import logit_loss
from fastdistil.losses.topk import topk_logit_loss
from fastdistil.models.capture import capture

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "attention_loss",
    "backends",
    "capture",
    "empty_cache",
    "hidden_loss",
    "linear_logit_loss",
    "linear_topk_logit_loss",
    "logit_loss",
    "teacher",
    "topk_logit_loss",
]
