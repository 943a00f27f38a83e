"""Every Triton kernel and CUDA source, compiled for GPUs that need not be here.

`make test` compiles for sm_90a: of each Triton kernel as many configurations as meet every value of every option (tests/aot.py:
enough), and of the CUDA sources the kernels nearest to the registers' limit. FASTDISTIL_AOT_TARGETS, which `make aot` and
`make versions` set, names the targets, for which all is compiled.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulator import launching_less

ROOT = Path(__file__).parents[2]
EVERYTHING = "FASTDISTIL_AOT_TARGETS" in os.environ
TARGETS = os.environ.get("FASTDISTIL_AOT_TARGETS", "sm_90a").split()
# Those of the CUDA kernels' build (csrc/CMakeLists.txt).
ARCHITECTURES = [target for target in ("sm_80", "sm_90a") if target in TARGETS]


@pytest.mark.aot
@pytest.mark.timeout(1200)
def test_triton_kernels_compile_for_every_target_without_spills() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "tests/aot.py", *TARGETS, *(() if EVERYTHING else ("--few",))]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert {r["case"].split(":")[0] for r in records} >= {"logit", "hidden", "attention", "sparse"}
    assert {r["target"] for r in records} == set(TARGETS)
    problems = [f"{r['case']} on {r['target']}: {p}" for r in records for p in _problems(r)]
    assert not problems, "\n".join(problems)


def _problems(record: dict) -> list[str]:
    found = []
    if record["spill_bytes"]:
        found.append(f"spills {record['spill_bytes']} bytes")
    if record["shared_bytes"] > record["shared_limit"]:
        found.append(f"needs {record['shared_bytes']} bytes of shared memory, the limit is {record['shared_limit']}")
    if record["fusion"] is None:
        found.append("leaves enable_fp_fusion to the compiler's default, which Triton 3.10 changes")
    if "C7515" in record["warnings"]:
        found.append("wgmma is serialised (C7515)")
    if record["wide_loads"] and not record["loads_of_16_bytes"]:
        found.append("has no 16-byte loads")
    return found


# Element types whose kernels `make test` compiles for a simple rule alone, and those that it compiles for one of each kind of
# rule; `make aot` all for all: their twins' registers run out first. In logit.cu float32's are as many as 16 bits', float64's
# have a limit of 255, not of 128; in logit_cluster.cu each rule takes as many for one type as for the other, 100 of 128 at most.
MIXTURE = "std::is_same_v<Rule, JensenShannon>"
KINDS = f"std::is_same_v<Rule, ForwardKL> || {MIXTURE}"
FEW = {
    "logit.cu": ((("double", "__nv_bfloat16", "__half"), "!Rule::softmax"), (("float",), KINDS)),
    "logit_cluster.cu": ((("float", "__half"), "std::is_same_v<Rule, ForwardKL>"), (("__nv_bfloat16",), MIXTURE)),
}

# Half a minute of compilation, for `make aot` alone: its instructions are tested in the emulation.
LONG = {"logit_cluster.cu": [pytest.mark.soak]}
SOURCES = [
    pytest.param(path, id=path.name, marks=LONG.get(path.name, []))
    for path in sorted((ROOT / "kernels/cuda").glob("*.cu"))
]


@pytest.mark.aot
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_cuda_sources_compile_without_spills(source: Path, arch: str, tmp_path: Path) -> None:
    compiled = source
    if not EVERYTHING:
        compiled = tmp_path / source.name
        text = source.read_text()
        for types, rule in FEW.get(source.name, ()):
            text = launching_less(text, types, rule)
        compiled.write_text(text)
    command = ["nvcc", f"-arch={arch}", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", "-cubin"]
    command += [f"-I{source.parent}", compiled, "-o", tmp_path / "k.cubin"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    spills = [line for line in result.stderr.splitlines() if "spill" in line and "0 bytes spill stores" not in line]
    assert "registers" in result.stderr
    assert not spills, "\n".join(spills)
