"""Test-only shortcuts in Triton's interpreter: the same results, bit for bit, in a fraction of the time.

Most of the interpreter's time goes into types and shapes, which it makes anew for each operation: here they are kept, and
operators on numbers of one plain type go to numpy at once. Versions whose semantics are not in a class (Triton 3.3 and older) run as they are.
"""

import numpy as np
import triton.language as tl
import triton_interpreter_fix  # noqa: F401  patches `tl` for good, and what is installed here goes over it
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
        key = type.name
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


# Operators go to numpy at once; where they are fused (triton_interpreter_fusion.py) they do not.
DIRECT = [True]

# What the interpreter makes of them in the end.
ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
DIVISION = {"truediv": np.divide}
COMPARISONS = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
COMPARISONS |= {"eq": np.equal, "ne": np.not_equal}
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or}
NUMBERS = {"fp32": np.float32, "int32": np.int32, "int64": np.int64}
PYTHON = {"fp32": (float, int), "int32": (int,), "int64": (int,)}

_elements, _constants, _booleans, _pointers = {}, {}, {}, {}


def element(kind):
    """The name of a type's elements."""
    if kind.name not in _elements:
        _elements[kind.name] = kind.scalar.name
    return _elements[kind.name]


def constant(value, name):
    """As scalar_constant makes it: a zero has no sign."""
    key = (value, name)
    if key not in _constants:
        _constants[key] = np.array([value or 0], NUMBERS[name])
    return _constants[key]


def boolean(kind):
    if kind.name not in _booleans:
        _booleans[kind.name] = kind.with_element_ty(tl.int1) if kind.is_block() else tl.int1
    return _booleans[kind.name]


def pointers_to(pointer, offsets):
    """The type of a pointer plus a block of offsets, and the bytes of what it points to."""
    key = (pointer.name, offsets.name)
    if key not in _pointers:
        width = max(1, pointer.scalar.element_ty.primitive_bitwidth // 8)
        _pointers[key] = (offsets.with_element_ty(pointer) if offsets.is_block() else pointer), width
    return _pointers[key]


def handle_of(data, dtype):
    made = new_handle(I.TensorHandle)
    made.data, made.dtype, made.attr = data, dtype, {}
    return made


new_handle = I.TensorHandle.__new__


def install_operators():
    """Of tensors that have one type of elements and one shape, or of which one is a scalar, or of a tensor and a number."""
    tensor = tl.tensor

    def operands(x, y, names):
        """The other operand's numbers and the tensor that has the result's shape; None where the slow way is wanted."""
        kind = x.type
        name = element(kind)
        if name not in names or not DIRECT[0]:
            return None
        if type(y) is tl.constexpr:
            y = y.value
        if type(y) is tensor:
            other = y.type
            if other.name == kind.name:
                return y.handle.data, x
            if element(other) != name:
                return None
            if not other.is_block():
                return y.handle.data, x
            return None if kind.is_block() else (y.handle.data, y)
        if type(y) in PYTHON.get(name, ()) and (name == "fp32" or -(2**31) <= y < 2**31):
            return constant(y, name), x
        return None

    def fast(way, ufunc, names, compares=False, reflected=False):
        slow = getattr(tensor, way)

        def run(self, other):
            found = operands(self, other, names)
            if found is None:
                return slow(self, other)
            y, like = found
            x = self.handle
            data = ufunc(y, x.data) if reflected else ufunc(x.data, y)
            return tensor(handle_of(data, x.dtype.scalar), boolean(like.type) if compares else like.type)

        setattr(tensor, way, run)

    add, choose = tensor.__add__, tl.where

    def moved(self, other):
        kind = self.type
        if type(other) is tensor and element(kind).startswith("pointer") and element(other.type) in ("int32", "int64"):
            block = kind.is_block()
            if not block or not other.type.is_block() or kind.get_block_shapes() == other.type.get_block_shapes():
                found, width = (kind, pointers_to(kind, tl.int32)[1]) if block else pointers_to(kind, other.type)
                data = self.handle.data + width * other.handle.data.astype(np.uint64)
                return tensor(handle_of(data, self.handle.dtype.scalar), found)
        return add(self, other)

    def where(condition, x, y):
        if type(condition) is tensor and element(condition.type) == "int1":
            found = None
            if type(x) is tensor:
                found = operands(x, y, NUMBERS)
                numbers = found and (x.handle.data, found[0])
            elif type(y) is tensor:
                found = operands(y, x, NUMBERS)
                numbers = found and (found[0], y.handle.data)
            if found is not None:
                kind = found[1].type
                if boolean(kind).name == condition.type.name or not condition.type.is_block() or not kind.is_block():
                    of = kind if kind.is_block() else condition.type.with_element_ty(kind.scalar)
                    return tensor(handle_of(np.where(condition.handle.data, *numbers), kind.scalar), of)
        return choose(condition, x, y)

    tensor.__add__, tl.where = moved, where
    for name, ufunc in (ARITHMETIC | DIVISION).items():
        names = {"fp32"} if name in DIVISION else set(NUMBERS)
        fast(f"__{name}__", ufunc, names)
        fast(f"__r{name}__", ufunc, names, reflected=True)
    for name, ufunc in COMPARISONS.items():
        fast(f"__{name}__", ufunc, set(NUMBERS), compares=True)
    for name, ufunc in LOGIC.items():
        fast(f"__{name}__", ufunc, {"int1"})


I._get_np_dtype = get_np_dtype
if hasattr(semantic, "TritonSemantic"):
    install()
    install_operators()
