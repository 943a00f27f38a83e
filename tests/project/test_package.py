"""What gets installed: the wheel's and the source distribution's contents, a build without nvcc, an editable install."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKING = {".venv", "build", "dist", "runs", ".git"}
# Of the libraries that manylinux_2_28 lets a wheel expect of any system, those that a C++ extension links to.
OF_ANY_SYSTEM = {"libc.so.6", "libgcc_s.so.1", "libm.so.6", "libpthread.so.0", "libstdc++.so.6"}
LOADERS = {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy with a little in each folder that a working checkout has more of, for all of which is looked through."""
    folder, source = tmp_path_factory.mktemp("sdist"), tmp_path_factory.mktemp("checkout") / "fastdistil"
    shutil.copytree(ROOT, source, ignore=lambda at, names: WORKING & set(names) if Path(at) == ROOT else ())
    for name in WORKING:
        (source / name).mkdir()
        (source / name / "module.py").touch()
    code = f"from scikit_build_core.build import build_sdist; print(build_sdist({str(folder)!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return next(folder.glob("*.tar.gz"))


def test_the_sdist_holds_all_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"csrc/CMakeLists.txt", "kernels/cuda/logit.cu", "kernels/triton/logit.py", "LICENSE", "README.md"} <= names
    assert {"benchmarks/cases.py", "fastdistil/py.typed", "fastdistil/configs/shipped/finetune-ner.yaml"} <= names
    assert not any(name.endswith((".so", ".o", ".whl")) for name in names)
    assert not {name.split("/")[0] for name in names} & {*WORKING, ".github", ".ci"}


@pytest.mark.soak
def test_a_wheel_from_the_sdist_without_nvcc(sdist: Path, tmp_path: Path) -> None:
    """Built as on a machine without nvcc, then imported from the unpacked wheel."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(path for path in tmp_path.iterdir() if path.is_dir())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheels"]
    # Without optimisation, as for a processor that has no instruction sets of its own in CMakeLists.txt: what is in the
    # wheel is what counts here, and it is compiled a second time. CMake believes the processor if the system is named too.
    defines = {"FASTDISTIL_CUDA": "OFF", "FASTDISTIL_OPTIMIZE": "-O0"}
    defines |= {"CMAKE_SYSTEM_NAME": platform.system(), "CMAKE_SYSTEM_PROCESSOR": "any"}
    options = [x for name, value in defines.items() for x in ("-C", f"cmake.define.{name}={value}")]
    result = subprocess.run([*command, *options, source], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    with zipfile.ZipFile(next((tmp_path / "wheels").glob("*.whl"))) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "site")
    packages = {name.split("/")[0] for name in names}
    assert {p for p in packages if not p.endswith(".dist-info")} == {"fastdistil"}
    assert {"fastdistil/kernels/triton/logit.py", "fastdistil/benchmarks/cases.py", "fastdistil/py.typed"} <= set(names)
    assert "fastdistil/configs/shipped/finetune-ner.yaml" in names
    assert not any(name.startswith("fastdistil/benchmarks/results") or name.endswith(".sh") for name in names)
    (extension,) = (tmp_path / "site" / name for name in names if name.endswith(".so"))
    assert b".nv_fatbin" not in extension.read_bytes()  # the section that holds a GPU's machine code
    if platform.system() == "Linux":
        found = subprocess.run(["readelf", "-d", extension], capture_output=True, text=True, check=True).stdout
        needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", found))
        # The runtime that torch brings and loads first (fastdistil/backends/__init__.py); no copy of it in the wheel.
        assert needed - OF_ANY_SYSTEM - LOADERS == {"libgomp.so.1"}
        assert "RUNPATH" not in found and "RPATH" not in found
    code = (
        f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]; "
        f"sys.path.insert(0, {str(tmp_path / 'site')!r}); import torch, fastdistil, fastdistil._C as c; "
        "print(fastdistil.__file__, repr(c.cuda_arches), fastdistil.backends()['cpu'], fastdistil.backends()['cuda'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    where, arches, cpu, why = result.stdout.strip().split(" ", 3)
    assert Path(where).is_relative_to(tmp_path / "site")
    assert (arches, cpu) == ("''", "True")
    assert "built without nvcc" in why


def test_an_installation_leaves_the_checkout_off_the_path(tmp_path: Path) -> None:
    """Whatever lies in the checkout or beside it is none of a program's modules, where the package is installed editable
    as anywhere."""
    code = "import fastdistil, sys; print(*sys.path, sep='\\n')"  # -I: without PYTHONPATH and the working directory
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert not {ROOT, ROOT.parent} & {Path(line).resolve() for line in result.stdout.splitlines()}
