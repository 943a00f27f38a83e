"""Test-only shortcuts in Triton's interpreter: the same results, bit for bit, in a quarter of the time.

Most of the interpreter's time goes into types and shapes, which it makes anew for each operation: here they are kept.
Versions whose semantics are not in a class (Triton 3.3 and older) run as they are.
"""

import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter as I

# Types whose operations on two operands of one type have that type; division of 16-bit ones has not.
PLAIN = frozenset({"fp32", "fp64", "int1", "int32", "uint32", "int64", "uint64"})

_np_dtype, _np_dtypes = I._get_np_dtype, {}


def get_np_dtype(dtype):
    name = dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _np_dtype(dtype)
    return _np_dtypes[name]


def install():
    Semantic = semantic.TritonSemantic
    block_init, tensor_init = tl.block_type.__init__, tl.tensor.__init__
    blocks, tensors = {}, {}

    def block_type_init(self, element_ty, shape):
        shape = shape.value if type(shape) is tl.constexpr else shape
        key = (element_ty.name, *[s.value if type(s) is tl.constexpr else s for s in shape])
        if key not in blocks:
            block_init(self, element_ty, shape)
            blocks[key] = (self.shape, self.numel, self.name)
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def init(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key not in tensors:
            tensor_init(self, handle, type)
            tensors[key] = (self.shape, self.numel)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[key]

    tl.block_type.__init__, tl.tensor.__init__ = block_type_init, init

    broadcast, to_tensor = Semantic.broadcast_impl_value, Semantic.to_tensor
    check = Semantic.binary_op_type_checking_impl

    def broadcast_impl_value(self, lhs, rhs):
        a, b = lhs.type, rhs.type
        if a.is_block() == b.is_block() and (not a.is_block() or tuple(a.shape) == tuple(b.shape)):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def binary_op_type_checking_impl(self, lhs, rhs, *flags, **named):
        if type(lhs) is tl.tensor and lhs.dtype.name in PLAIN:
            name = lhs.dtype.name
            if type(rhs) is tl.tensor and rhs.dtype.name == name:
                return broadcast_impl_value(self, lhs, rhs)
            if name == "fp32" and type(rhs) in (float, int):
                return broadcast_impl_value(self, lhs, self.scalar_constant(rhs, lhs.dtype))
        elif type(rhs) is tl.tensor and rhs.dtype.name == "fp32" and type(lhs) in (float, int):
            return broadcast_impl_value(self, self.scalar_constant(lhs, rhs.dtype), rhs)
        return check(self, lhs, rhs, *flags, **named)

    def at_once(self, x, check_type=True):
        return x if type(x) is tl.tensor else to_tensor(self, x, check_type)

    def no_check(self, lhs, rhs, binary_op):
        """Integer overflow is computed in 64 bits for an assertion that the interpreter makes under `debug` alone."""

    Semantic.broadcast_impl_value, Semantic.to_tensor = broadcast_impl_value, at_once
    Semantic.binary_op_type_checking_impl = binary_op_type_checking_impl
    if not I.InterpreterOptions.debug:
        Semantic.binary_op_sanitize_overflow_impl = no_check


I._get_np_dtype = get_np_dtype
if hasattr(semantic, "TritonSemantic"):
    install()
