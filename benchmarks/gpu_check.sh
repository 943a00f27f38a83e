#!/usr/bin/env bash
# Proves and measures everything on a GPU: benchmarks/gpu_check.sh OUT_FOLDER [options]
#
#   --small          a dry run with tiny shapes (also without a GPU)
#   --only A,B       these steps alone, each with all the time there is: exactness, logits, linear, topk, hidden,
#                    attention, steps, sparse, tests, sanitize; records that OUT_FOLDER already has are kept
#   --wheels FOLDER  installs its *.whl beside fastdistil, without an index and without what they need: baselines
#                    (on a machine with an index: pip download --no-deps -d FOLDER liger-kernel==0.8.5
#                    orda-kernel==0.1.0 flash-linear-attention==0.6.0 fla-core==0.6.0 einops)
#   --commit HASH    what the records say where the checkout has no .git
#
# Builds the package offline with this machine's own torch, triton and nvcc, measures the most valuable records, runs
# the tests on the GPU and compute-sanitizer, measures the rest, then what was cut off. At most 9 minutes in all: every
# step has its own limit, and what a step that is cut off has written stays. The exit code is the number of steps that
# failed.
set -uo pipefail

usage() {
  sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || usage
target=$1
shift
small="" only="" wheels=""
while [ $# -gt 0 ]; do
  case $1 in
    --small) small=--small ;;
    --only) only=${2:?} && shift ;;
    --wheels) wheels=$(cd "${2:?}" && pwd) || exit 2 && shift ;;
    --commit) export FASTDISTIL_COMMIT=${2:?} && shift ;;
    *) usage ;;
  esac
  shift
done
mkdir -p "$target" || exit 2
out=$(cd "$target" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
log=$out/log.txt
[ -n "$only" ] || : >"$log"
failed=0
cut=()
deadline=$((SECONDS + 532))
report_seconds=20 # kept for the report
unset TRITON_INTERPRET

say() { echo "$*" | tee -a "$log"; }

# step LIMIT_SECONDS NAME COMMAND...
step() {
  local limit=$1 name=$2 left=$((deadline - SECONDS)) start=$SECONDS
  shift 2
  [ "$name" != report ] && left=$((left - report_seconds))
  if [ "$left" -lt 10 ]; then
    say "SKIPPED $name: the time is used up"
    failed=$((failed + 1))
    return 1
  fi
  [ -z "$gpu" ] && limit=$((3 * limit)) # a dry run, on few cores perhaps
  { [ "$limit" -gt "$left" ] || { [ -n "$only" ] && [ "$name" != build ]; }; } && limit=$left
  say "== $name (at most $limit s): $*"
  limit=$limit timeout --signal=INT --kill-after=5 "$limit" "$@" >>"$log" 2>&1
  local code=$?
  if [ $code -eq 0 ]; then
    say "ok      $name: $((SECONDS - start)) s"
  else
    say "FAILED  $name: exit code $code after $((SECONDS - start)) s$([ $code -ge 124 ] && echo ' (cut off)')"
    failed=$((failed + 1))
  fi
  return $code
}

have() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }
wanted() { [ -z "$only" ] || [[ ",$only," == *",$1,"* ]]; }
pip_install() {
  "$python" -m pip install --no-index --no-deps --no-compile --disable-pip-version-check --upgrade --target "$site" "$@"
}

site=$out/site # of its own, so that the machine's packages stay as they are
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$site"
for wheel in ${wheels:+"$wheels"/*.whl}; do
  pip_install "$wheel" >>"$log" 2>&1 || say "not installed: $wheel"
done

# What is missing, said at the start.
missing=()
for module in torch triton numpy pytest typer rich matplotlib pybind11 scikit_build_core hypothesis transformers; do
  have "$module" || missing+=("python module $module")
done
for module in liger_kernel orda_kernel fla; do have "$module" || missing+=("baseline $module (--wheels)"); done
"$python" -c "import sys, torch.nn.functional as F; sys.exit(not hasattr(F, 'linear_cross_entropy'))" 2>/dev/null ||
  missing+=("baseline torch's F.linear_cross_entropy (torch 2.13)")
have xdist || missing+=("python module xdist: the tests run in one process")
for tool in nvcc cmake ninja compute-sanitizer nvidia-smi; do command -v "$tool" >/dev/null || missing+=("$tool"); done
gpu=$("$python" -c "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')" 2>/dev/null)
[ -n "$gpu" ] || missing+=("a GPU that torch can use")
commit=$(git rev-parse --short=12 HEAD 2>/dev/null || echo "${FASTDISTIL_COMMIT:-unknown}")
say "gpu_check: ${gpu:-no GPU}, $("$python" --version 2>&1), $(nproc) cores, commit $commit"
[ ${#missing[@]} -gt 0 ] && printf 'missing: %s\n' "${missing[@]}" | tee -a "$log"
if [ -z "$gpu" ] && [ -z "$small" ]; then
  say "without a GPU only a dry run is possible: benchmarks/gpu_check.sh $target --small"
  exit 1
fi

build() { # for this GPU alone; where there is none, without kernels for any
  local settings=(--config-settings=build-dir="$out/build") arch
  if [ -z "$gpu" ]; then
    settings+=(--config-settings=cmake.define.FASTDISTIL_CUDA=OFF)
  else
    arch=$("$python" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
    [ "$arch" = 90 ] && arch=90a
    settings+=(--config-settings=cmake.define.FASTDISTIL_CUDA_ARCHITECTURES="$arch-real")
  fi
  pip_install --no-build-isolation "${settings[@]}" .
}
# From the checkout, for its commit and sources, but with the package that was built: an empty entry of sys.path is the
# working directory.
clean='import sys; sys.path[:] = [p for p in sys.path if p]'
bench() { "$python" -c "$clean; from fastdistil.cli import main; main()" "$@"; }
run_tests() { # MARKS; stops in time to say how far it came
  local workers=$(($(nproc) - 2)) options=()
  [ "$workers" -gt 14 ] && workers=14
  [ "$workers" -ge 2 ] && have xdist && options+=(-n "$workers")
  have pytest_timeout && options+=(--session-timeout="$((limit > 30 ? limit - 12 : limit / 2))")
  local files=(tests)
  [ -n "$small" ] && files=(tests/benchmarks/test_bench.py tests/sparse/test_sparse_gpu.py tests/project/test_cli.py)
  "$python" -c "$clean; import pytest; sys.exit(pytest.main(sys.argv[1:]))" "${files[@]}" "${options[@]}" \
    -q --tb=short --maxfail=50 -m "$1" -p no:cacheprovider
}
sanitize() { # TOOL
  local command=("$python" -c "$clean; from fastdistil.benchmarks.sanitize import main; sys.exit(main())")
  if command -v compute-sanitizer >/dev/null && [ -n "$gpu" ]; then
    command=(compute-sanitizer --tool "$1" --error-exitcode 1 --log-file "$out/$1.txt" "${command[@]}")
  fi
  "${command[@]}"
}
export -f build bench pip_install run_tests sanitize have
export python out gpu site small clean

measure() { # LIMIT WHAT: what was cut off is measured further at the end
  wanted "$2" || return 0
  step "$1" "$2" bash -c "bench bench $2 $small ${only:+--resume} --out '$out/$2.jsonl'"
  [ $? -ge 124 ] && cut+=("$2")
}

step 90 build bash -c build || exit 1
step 15 doctor bash -c "bench doctor"
measure 80 logits
measure 55 linear
wanted tests && step 100 tests bash -c "run_tests 'device and not aot'"
if wanted sanitize; then
  step 35 memcheck bash -c "sanitize memcheck"
  step 30 racecheck bash -c "sanitize racecheck"
fi
measure 25 attention
measure 25 steps
measure 12 hidden
measure 12 topk
measure 20 sparse
measure 12 exactness
for what in ${cut[@]+"${cut[@]}"}; do
  step 60 "$what, continued" bash -c "bench bench $what $small --resume --out '$out/$what.jsonl'"
done
# Last, what needs no GPU and is tested elsewhere: it uses up the time.
[ -z "$only" ] && step 200 "tests of the host" bash -c "run_tests 'not device and not aot'"
step "$report_seconds" report bash -c "bench bench --report --out '$out/all.jsonl'"

rm -rf "$site" "$out/build"
say "gpu_check: $failed steps failed; $SECONDS s; records, report.md, images/ and log.txt in $out"
exit "$failed"
