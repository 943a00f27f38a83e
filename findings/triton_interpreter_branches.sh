#!/usr/bin/env bash
# Triton's interpreter runs a kernel that its compiler refuses: a number handed to a helper and reassigned in a branch.
#
# Believed: what runs under TRITON_INTERPRET=1 compiles, as far as types go.
# Really, in triton 3.6.0 and 3.9.0: a Python number among the arguments of a @triton.jit function is a constexpr there.
# Where an `if` on a block's value gives that name a tensor, the compiler says "initial value for ... is of type
# constexpr" and stops; the interpreter has no types, and computes what was meant. So tests in the interpreter do not
# see it; the initial value has to be a tensor (tl.full).
# Date: 2026-11-30
#
# Exits 0 while it is so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q triton==3.9.0 numpy==2.4.6 2> /dev/null
cat > "$folder/kernel.py" << 'PYTHON'
import os

import triton
import triton.language as tl


@triton.jit
def larger(x, largest):
    top = tl.max(x, 0)
    if top > largest:
        largest = top
    return largest


@triton.jit
def kernel(n):
    found = larger(tl.arange(0, 16) + n, 0)
    tl.device_print("largest", found)


if os.environ.get("TRITON_INTERPRET"):
    kernel[(1,)](5)
else:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    print("triton", triton.__version__)
    try:
        triton.compile(ASTSource(kernel, {"n": "i32"}, {}), target=GPUTarget("cuda", 90, 32))
    except triton.CompilationError as error:
        while error.__cause__ is not None:
            error = error.__cause__
        print(type(error).__name__, error)
PYTHON
interpreted=$(TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/kernel.py")
compiled=$(TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/kernel.py")
echo "interpreted: $interpreted"
echo "compiled: $compiled"
grep -q 20 <<< "$interpreted" && grep -q 'initial value for `largest` is of type constexpr' <<< "$compiled"
