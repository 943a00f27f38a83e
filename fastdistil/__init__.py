"""fastdistil: fused, exact, memory-lean kernels for knowledge distillation."""

from fastdistil.backends import backends
from fastdistil.losses.logit import logit_loss

__version__ = "0.1.0"
__all__ = ["__version__", "backends", "logit_loss"]
