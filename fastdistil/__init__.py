"""fastdistil: fused, exact, memory-lean kernels for knowledge distillation."""

from fastdistil.backends import backends
from fastdistil.losses.attention import attention_loss
from fastdistil.losses.hidden import hidden_loss
from fastdistil.losses.logit import logit_loss
from fastdistil.losses.relation import relation_loss
from fastdistil.models.capture import capture

__version__ = "0.1.0"
__all__ = ["__version__", "attention_loss", "backends", "capture", "hidden_loss", "logit_loss", "relation_loss"]
