#!/usr/bin/env bash
# seqeval 1.2.2 cannot be installed with pip's --no-build-isolation beside setuptools alone.
#
# Believed: an environment that has setuptools can install any pure Python package that has no wheel, with or without
# isolation; seqeval, the usual scorer of named entities, is such a package.
# Really, with seqeval 1.2.2, setuptools 84.2.1 and pip 23.2.1: its version comes from setuptools_scm, which it names in
# setup_requires. Under PEP 517 setuptools only reports those, and without isolation nobody installs them: the version is
# 0.0.0. pip then refuses the file as inconsistent, tries 1.2.1 and 1.2.0 likewise, and ends with "No matching distribution
# found for seqeval>=1.2" although it lists 1.2.2 among the versions that it saw. With setuptools-scm there it installs.
# Date: 2026-11-30
#
# Exits 0 while it is so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -q pip==23.2.1 setuptools==84.2.1
pip list 2> /dev/null | grep -E '^(pip|setuptools) '
install() { pip install --no-cache-dir --no-build-isolation --no-deps 'seqeval>=1.2' > "$folder/log" 2>&1; }
if install; then
    echo "installed without setuptools-scm: this has changed"
    exit 1
fi
grep -oE "inconsistent version: expected '1.2.2', but metadata has '0.0.0'" "$folder/log" | head -1
grep -oE "No matching distribution found for seqeval>=1.2" "$folder/log"
pip install -q setuptools-scm
install
pip list 2> /dev/null | grep -E '^(seqeval|setuptools[-_]scm) '
