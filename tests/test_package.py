"""What gets installed: the wheel's and the source distribution's contents, and a build without nvcc."""

from __future__ import annotations

import platform
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from scikit_build_core.build import build_sdist; print(build_sdist({str(folder)!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return next(folder.glob("*.tar.gz"))


def test_the_sdist_holds_all_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"csrc/CMakeLists.txt", "kernels/cuda/logit.cu", "kernels/triton/logit.py", "LICENSE", "README.md"} <= names
    assert not any(name.endswith((".so", ".o")) or name.startswith((".venv", "build/")) for name in names)


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
    code = (
        f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]; "
        f"sys.path.insert(0, {str(tmp_path / 'site')!r}); import fastdistil, fastdistil._C as c; "
        "print(fastdistil.__file__, repr(c.cuda_arches), fastdistil.backends()['cpu'], fastdistil.backends()['cuda'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    where, arches, cpu, why = result.stdout.strip().split(" ", 3)
    assert Path(where).is_relative_to(tmp_path / "site")
    assert (arches, cpu) == ("''", "True")
    assert "built without nvcc" in why
