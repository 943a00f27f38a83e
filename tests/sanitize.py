"""The suite's kernel tests, and drawn calls of the bindings, under sanitizers.

    python tests/sanitize.py [address] [host] [thread] [--seconds 1800] [--x86] [--page docs/reliability.md]

address   csrc/ with AddressSanitizer and UndefinedBehaviorSanitizer (an error ends the process), under the tests of
          KERNEL_TESTS and tests/fuzz_bindings.py
host      kernels/cuda/ in their emulation with AddressSanitizer, which is told of each change of stack
thread    csrc/ under tests/support/thread_driver.cpp with ThreadSanitizer, clang's OpenMP and its Archer, which knows
          OpenMP's synchronisation; nothing is suppressed

--x86 builds the kernels of every instruction set instead of the generic ones alone, which have the same sources.
LeakSanitizer is off: CPython and torch keep what they have until the process ends, which it takes for leaks; memory
that grows is tests/long_run.py's subject.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))

import pybind11
from reliability import Row, write_rows

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/sanitize"
KERNEL_TESTS = [
    "tests/losses/test_logit.py", "tests/losses/test_logit_terms.py", "tests/losses/test_topk.py",
    "tests/losses/test_hidden.py", "tests/losses/test_attention.py", "tests/losses/test_acceptance.py",
    "tests/sparse/test_sparse_select.py", "tests/sparse/test_sparse_adamw.py",
    "tests/project/test_faults.py",
]  # fmt: skip
HOST_TESTS = ["tests/backends/test_cuda_host.py"]
ADDRESS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def library(name: str) -> str:
    """A runtime of GCC, which has to be loaded before everything else."""
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def built(x86: bool) -> Path:
    """A folder with the package, its extension built with the sanitizers."""
    folder = BUILD / "address"
    command = ["cmake", "-S", ROOT / "csrc", "-B", folder, "-G", "Ninja", "-DFASTDISTIL_CUDA=OFF"]
    command += ["-DCMAKE_BUILD_TYPE=None", f"-DFASTDISTIL_X86={'ON' if x86 else 'OFF'}", "-DFASTDISTIL_OPTIMIZE=-O1"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    command += [f"-DCMAKE_CXX_FLAGS={ADDRESS}"]
    if ninja := shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        command += [f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if ccache := shutil.which("ccache"):
        command += [f"-DCMAKE_CXX_COMPILER_LAUNCHER={ccache}"]
    subprocess.run(command, check=True)
    subprocess.run(["cmake", "--build", folder], check=True)
    package = folder / "package/fastdistil"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in [*(ROOT / "fastdistil").iterdir(), ROOT / "kernels", ROOT / "benchmarks"]:
        (package / path.name).symlink_to(path)
    extension = next(folder.glob("_C*.so"))
    (package / extension.name).symlink_to(extension)
    return package.parent


def under(folder: Path | None, command: list[str], **more: str) -> tuple[int, str]:
    """Runs Python with the sanitizers' runtimes; exit code and output."""
    preload = f"{library('libasan.so')} {library('libubsan.so')} {library('libstdc++.so')}"
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": preload, "OMP_NUM_THREADS": "2", **more}
    if folder is not None:
        environment["FASTDISTIL_SANITIZED"] = str(folder)
    lines = []
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def tests(folder: Path | None, paths: list[str], **more: str) -> Row:
    command = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "sanitized",
        "-m",
        "not drawn and not soak",
        *paths,
    ]
    code, output = under(folder, command, **more)
    counted = re.findall(r"(\d+) (?:passed|skipped)", output)
    reports = len(re.findall(r"ERROR: AddressSanitizer|runtime error:", output))
    what = "kernels/cuda/ in the emulation" if folder is None else "csrc/"
    failed = reports or int(code != 0)
    return Row(
        f"{what} under AddressSanitizer, tests of {len(paths)} files", counted[0] if counted else "0", str(failed)
    )


def threads() -> Row:
    """The C++ kernels alone, without Python: ThreadSanitizer must have seen every thread and lock from the start."""
    folder = BUILD / "thread"
    folder.mkdir(parents=True, exist_ok=True)
    clang = next((found for name in ("clang++", "clang++-14") if (found := shutil.which(name))), None)
    if clang is None:
        raise RuntimeError(
            "sanitize: thread needs clang++ with libomp and Archer, such as libomp-14-dev, which is not there"
        )
    names = "acceptance attention attention_low_rank cross_entropy hidden logit row_moments sparse_select sparse_update topk"
    sources = [*(f"csrc/cpu/{name}.cpp" for name in names.split()), "csrc/cpu/dispatch.cpp", "csrc/cpu/pool.cpp"]
    sources += ["csrc/cpu/sparse_dispatch.cpp", "tests/support/thread_driver.cpp"]
    flags = ["-std=c++17", "-O1", "-g1", "-fsanitize=thread", "-fopenmp", "-DFD_ISA=generic", "-Wno-pass-failed"]
    objects, running = [], []
    for source in sources:
        made = folder / (Path(source).stem + ".o")
        objects.append(made)
        running.append(subprocess.Popen([clang, *flags, "-c", source, "-o", made], cwd=ROOT))
        if len(running) >= (os.cpu_count() or 1):
            assert running.pop(0).wait() == 0
    assert all(process.wait() == 0 for process in running)
    driver = folder / "driver"
    subprocess.run([clang, *flags, *objects, "-o", driver], cwd=ROOT, check=True)
    archer = Path(subprocess.run([clang, "-print-file-name=libarcher.so"], capture_output=True, text=True, check=True).stdout.strip())  # fmt: skip
    environment = {**os.environ, "OMP_TOOL_LIBRARIES": str(archer), "TSAN_OPTIONS": "ignore_noninstrumented_modules=1"}
    done = subprocess.run([driver], env=environment, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    calls = re.findall(r"(\d+) calls", done.stdout)
    races = done.stderr.count("WARNING: ThreadSanitizer")
    said = "csrc/ under ThreadSanitizer, calls with 1 to 4 threads from 3 threads at once"
    return Row(said, calls[0] if calls else "0", str(races or int(done.returncode != 0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["address", "host", "thread", []])
    parser.add_argument("--seconds", type=float, default=1800, help="of drawn calls, a family")
    parser.add_argument("--x86", action="store_true", help="every instruction set")
    parser.add_argument("--tests", nargs="*", default=KERNEL_TESTS, help="in place of KERNEL_TESTS")
    parser.add_argument("--page", type=Path, help="the page whose rows are written")
    asked = parser.parse_args()
    rows, parts, failed = list[Row](), asked.parts or ["address", "host", "thread"], 0
    if "address" in parts:
        folder = built(asked.x86)
        rows.append(tests(folder, asked.tests))
        page = ["--page", str(asked.page)] if asked.page else []
        failed, _ = under(folder, ["tests/fuzz_bindings.py", "--seconds", str(asked.seconds), *page])
    if "host" in parts:
        rows.append(tests(None, HOST_TESTS, FASTDISTIL_HOST_SANITIZER="address"))
    if "thread" in parts:
        rows.append(threads())
    if asked.page:
        write_rows(asked.page, "sanitizers", rows, ("Sanitizer", "Tests or calls", "Reports"), keep=True)
    sys.exit(failed != 0 or any(int(row.lost) for row in rows))


if __name__ == "__main__":
    main()
