#!/usr/bin/env bash
# Everything that only a GPU can show, in one go: builds the extension for it, runs the operator's tests on it, its kernels
# under compute-sanitizer, and times layers. Usage: PYTHON=python3 bench/gpu.sh RESULTS
# A failure of one part does not hide the others; the last lines are a table of what passed, and the exit code counts.
set -u
results=${1:?a folder for results}
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 2
mkdir -p "$results" || exit 2
results=$(cd "$results" && pwd)
export PYTHONPATH=$root PYTHONUNBUFFERED=1
summary=()
failed=0

part() { # NAME COMMAND...: runs it, keeps its output in RESULTS/NAME.log, prints the end
  local name=$1 start=$SECONDS status=passed
  shift
  echo "== $name"
  "$@" >"$results/$name.log" 2>&1 || { status=FAILED failed=$((failed + 1)); }
  tail -n 5 "$results/$name.log"
  summary+=("$(printf '%-12s %-7s %4d s  %s' "$name" "$status" $((SECONDS - start)) "$(tail -n 1 "$results/$name.log" | cut -c1-100)")")
}

# The architecture of this GPU alone: a third of the compile time.
architecture=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || exit 2
part build env TCURLORA_BUILD=1 TORCH_CUDA_ARCH_LIST="$architecture" "$python" setup.py build_ext --inplace
part doctor "$python" -m tcurlora_ext doctor
part tests env TCURLORA_TEST_DEVICE=cuda "$python" -m pytest -q --maxfail 20 -p no:cacheprovider \
  tests/operator tests/kernels --ignore tests/operator/test_without_extension.py
# Races are looked for in this project's CUDA kernels, all of which are instances of steps_of.
part memcheck compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -m tcurlora_ext.bench.sanitize
part racecheck compute-sanitizer --tool racecheck --error-exitcode 1 --kernel-regex kns=steps_of \
  "$python" -m tcurlora_ext.bench.sanitize
part layers "$python" -m tcurlora_ext.bench.layers --device cuda --dtype bfloat16 --rounds 30 --output "$results"
printf '%s\n' "" "${summary[@]}"
exit $((failed > 0))
