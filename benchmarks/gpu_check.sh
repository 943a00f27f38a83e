#!/usr/bin/env bash
# Proves and measures everything on a GPU: benchmarks/gpu_check.sh OUT_FOLDER [--small]
#
# Builds the package offline with this machine's own torch, triton and nvcc, measures the most valuable records, runs
# the whole test suite and compute-sanitizer, then measures the rest. At most 9 minutes in all; every step has its own
# limit, and what a step that is cut off has written stays. --small is a dry run with tiny shapes (also without a GPU).
# The exit code is the number of steps that failed.
set -uo pipefail

if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
  echo "usage: benchmarks/gpu_check.sh OUT_FOLDER [--small]" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
small=${2:-}
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
log=$out/log.txt
: >"$log"
failed=0
deadline=$((SECONDS + 535))
unset TRITON_INTERPRET

say() { echo "$*" | tee -a "$log"; }

# step LIMIT_SECONDS NAME COMMAND...
step() {
  local limit=$1 name=$2 left=$((deadline - SECONDS)) start=$SECONDS
  shift 2
  if [ "$left" -lt 10 ]; then
    say "SKIPPED $name: the time is used up"
    failed=$((failed + 1))
    return 1
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  say "== $name (at most $limit s): $*"
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
  local code=$?
  if [ $code -eq 0 ]; then
    say "ok      $name: $((SECONDS - start)) s"
  else
    say "FAILED  $name: exit code $code after $((SECONDS - start)) s$([ $code -ge 124 ] && echo ' (cut off)')"
    failed=$((failed + 1))
  fi
  return $code
}

have() { "$python" -c "import $1" 2>/dev/null; }

# What is missing, said at the start.
missing=()
for module in torch triton numpy pytest typer rich matplotlib pybind11 scikit_build_core liger_kernel hypothesis; do
  have "$module" || missing+=("python module $module")
done
for tool in nvcc cmake ninja compute-sanitizer nvidia-smi; do command -v "$tool" >/dev/null || missing+=("$tool"); done
gpu=$("$python" -c "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')" 2>/dev/null)
[ -n "$gpu" ] || missing+=("a GPU that torch can use")
say "gpu_check: ${gpu:-no GPU}, $("$python" --version 2>&1), $(nproc) cores, commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)"
if [ ${#missing[@]} -gt 0 ]; then
  printf 'missing: %s\n' "${missing[@]}" | tee -a "$log"
fi
if [ -z "$gpu" ] && [ "$small" != "--small" ]; then
  say "without a GPU only a dry run is possible: benchmarks/gpu_check.sh $1 --small"
  exit 1
fi

# Into a folder of its own, so that the machine's packages stay as they are.
site=$out/site
export PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1
step 200 build "$python" -m pip install --no-deps --no-build-isolation --upgrade --target "$site" \
  --config-settings=build-dir="$out/build" . || exit 1
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
bench() { # from the checkout, for its commit and sources; the package is the one built above (-P: not the checkout's)
  "$python" -c "import sys; sys.path[:] = [p for p in sys.path if p]; from fastdistil.cli import main; main()" "$@"
}
export -f bench
export python
measure() { # LIMIT WHAT
  step "$1" "bench $2" bash -c "bench bench $2 $small --out '$out/$2.jsonl'"
}

step 60 doctor bash -c "bench doctor"
measure 30 exactness
measure 120 logits
measure 80 linear
tests=(tests)
[ "$small" = "--small" ] && tests=(tests/test_bench.py tests/test_cli.py)
step 170 tests "$python" -c "import sys, pytest; sys.path[:] = [p for p in sys.path if p]; sys.exit(pytest.main(sys.argv[1:]))" \
  "${tests[@]}" -q -x --maxfail=20 -m "not aot" -p no:cacheprovider
if command -v compute-sanitizer >/dev/null && [ -n "$gpu" ]; then
  for tool in memcheck racecheck; do
    step 60 "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 --log-file "$out/$tool.txt" \
      "$python" -c "import sys; sys.path[:] = [p for p in sys.path if p]; from fastdistil.benchmarks.sanitize import main; sys.exit(main())"
  done
else
  step 60 "sanitize, without compute-sanitizer" "$python" \
    -c "import sys; sys.path[:] = [p for p in sys.path if p]; from fastdistil.benchmarks.sanitize import main; sys.exit(main())"
fi
measure 90 attention
measure 60 hidden
measure 30 topk
measure 60 sparse
step 40 report bash -c "bench bench --report --out '$out/all.jsonl'"

rm -rf "$site" "$out/build"
say "gpu_check: $failed steps failed; $SECONDS s; records, report.md, images/ and log.txt in $out"
exit "$failed"
