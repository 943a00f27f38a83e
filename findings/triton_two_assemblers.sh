#!/usr/bin/env bash
# Triton 3.9's wheel holds two assemblers, and the one called ptxas does not read what Triton emits.
#
# Believed: triton/backends/nvidia/bin/ptxas assembles the PTX that the same wheel emits, as in Triton 3.6, so that a
# script may run `ptxas -v` on compiled.asm["ptx"] to see registers and spills.
# Really, in triton 3.9.0: bin/ptxas is CUDA 12.9's. For sm_90 and newer Triton itself takes bin/ptxas-blackwell,
# which is CUDA 13.4's and decides the PTX version, 9.4. bin/ptxas refuses that. In 3.6 ptxas-blackwell was taken for
# sm_100 and newer alone. triton.backends.nvidia.compiler.get_ptxas(arch).path is the right one in both.
# Date: 2026-11-29
#
# Exits 0 while it is so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q triton==3.9.0 numpy==2.4.6 2> /dev/null
cat > "$folder/kernel.py" << 'PYTHON'
import subprocess
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource


@triton.jit
def double(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, 2 * tl.load(x_ptr + at, mask=at < n), mask=at < n)


signature = {"x_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
compiled = triton.compile(ASTSource(double, signature, {"BLOCK": 128}), target=GPUTarget("cuda", 90, 32))
here = Path(sys.argv[1])
(here / "k.ptx").write_text(compiled.asm["ptx"])
emitted = next(line for line in compiled.asm["ptx"].splitlines() if line.startswith(".version"))
print("triton", triton.__version__, "emits", emitted)


def assemble(tool: str) -> bool:
    done = subprocess.run([tool, "--gpu-name=sm_90a", here / "k.ptx", "-o", here / "k.o"], capture_output=True, text=True)
    print(tool.rsplit("/", 1)[1], "exits with", done.returncode, done.stderr.strip().splitlines()[:1])
    return done.returncode == 0


plain = assemble(str(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"))
taken = assemble(get_ptxas(90).path)
sys.exit(0 if taken and not plain else 1)
PYTHON
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/kernel.py" "$folder"
