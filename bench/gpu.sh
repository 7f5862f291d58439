#!/usr/bin/env bash
# What only a GPU can show: builds the extension for it, runs the operator's tests on it, its kernels under
# compute-sanitizer, benchmarks and profiles. Usage: PYTHON=python3 bench/gpu.sh RESULTS [PART...], by default all parts.
# A failure of one part does not hide the others; the last lines are a table of what passed, and the exit code counts.
# Needs no network; a case whose package (MONAI, transformers, PEFT) is missing is left out.
set -u
results=${1:?a folder for results}
shift
wanted=${*:-build doctor tests memcheck racecheck bench profile}
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
  [[ " $wanted " == *" $name "* ]] || return 0
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
sanitize=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1)
part memcheck "${sanitize[@]}" --tool memcheck "$python" -m tcurlora_ext.bench.sanitize
part racecheck "${sanitize[@]}" --tool racecheck --kernel-regex kns=steps_of "$python" -m tcurlora_ext.bench.sanitize
# Results are written case by case, the most wanted first: what is measured by then stays.
part bench timeout 400 "$python" -m tcurlora_ext bench --gpu --device cuda --rounds 20 --output "$results"
part profile "$python" -m tcurlora_ext.bench.profile "llama-3-8b q,o" --tokens 8192 --rank 4 --dtype bfloat16 --device cuda \
  --output "$results"
printf '%s\n' "" "${summary[@]}"
exit $((failed > 0))
