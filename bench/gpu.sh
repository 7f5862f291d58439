#!/usr/bin/env bash
# What only a GPU can show: builds the extension for it, tests the operator on it, runs its kernels under
# compute-sanitizer, measures and profiles. Needs no network.
#
#   PYTHON=python3 bench/gpu.sh RESULTS [a] [b] [PART...]
#
# The parts are in the table below, each with its time-out in seconds and the calls that it belongs to. The time-outs of a
# call, a or b, add up to less than five minutes. Without a choice both run. A part may take twice its seconds where earlier
# ones left some over. One that fails or is stopped does not hide the others, but without CUDA kernels nothing else runs.
# Results go to RESULTS as they come, with all output in gpu.log. The last lines are a table of what passed; the exit code
# is 1 where a part did not.
#
# TCURLORA_GPU_WHEELS   a folder of wheels to install into build/wheels first: packages that the machine lacks, such as
#                       MONAI. A case whose package (MONAI, transformers, PEFT) is missing is left out.
# TCURLORA_GPU_DRY_RUN  a command that runs instead of every step, with the part's name and the step as its arguments:
#                       echo shows what would be done.
# TCURLORA_GPU_SECONDS  the seconds that each part may take, instead of the table's.
set -u
table='
wheels        10 ab
build         90 ab
kernels       10 ab
smoke         10 a
cuda          25 a
operator      70 a
bench         60 a
triton        45 b
bench-triton  30 b
memcheck      20 b
racecheck     20 b
profile       22 b
networks     120 -
compiled      30 b
set          370 -
'
grace=2 # seconds between the signal that asks a step to end and the one that ends it

usage() { # MESSAGE
  echo "bench/gpu.sh: $1; usage: PYTHON=python3 bench/gpu.sh RESULTS [a] [b] [PART...], parts:" "${order[@]}" >&2
  exit 2
}

declare -A seconds=() calls=() outcome=() taken=() last=()
order=()
while read -r name limit call; do
  [[ -n $name ]] || continue
  order+=("$name") seconds[$name]=${TCURLORA_GPU_SECONDS:-$limit} calls[$name]=$call
done <<<"$table"
(($# > 0)) || usage "found no folder for the results"
results=$1
[[ $results != -* ]] || usage "found '$results', no folder for the results"
shift
(($# > 0)) || set -- a b
for choice in "$@"; do
  [[ " a b ${order[*]} " == *" $choice "* ]] || usage "found part '$choice'"
done
is_chosen() { # NAME CHOICE...: as a part or as one of a call; kernels always, wheels where a folder of them is given
  local name=$1 choice
  shift
  if [[ $name == wheels ]]; then
    [[ -n ${TCURLORA_GPU_WHEELS:-} ]]
    return
  fi
  for choice in "$@" kernels; do
    [[ $choice != "$name" && ${calls[$name]} != *"$choice"* ]] || return 0
  done
  return 1
}
chosen=() plan=() total=0
for name in "${order[@]}"; do
  is_chosen "$name" "$@" || continue
  chosen+=("$name") plan+=("$name ${seconds[$name]}") total=$((total + seconds[$name] + grace))
done

export python=${PYTHON:-python3} PYTHONUNBUFFERED=1
wheels=${TCURLORA_GPU_WHEELS:+$(cd "$TCURLORA_GPU_WHEELS" && pwd)} || usage "found no folder TCURLORA_GPU_WHEELS"
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$results" && results=$(cd "$results" && pwd) && cd "$root" || exit 2
export wheels PYTHONPATH=$root:$root/build/wheels
log=$results/gpu.log
failed=0 child=

summarise() { # the last lines, however the script ends
  local name
  echo
  for name in "${chosen[@]}"; do
    printf '%-13s %-9s %4d s  %s\n' "$name" "${outcome[$name]:-not run}" "${taken[$name]:-0}" "${last[$name]:-}"
  done
}
stop() { # the script was told to end
  if [[ -n $child ]]; then
    kill "$child"
    wait "$child"
  fi
  exit 143
}
trap 'summarise | tee -a "$log"' EXIT
trap stop HUP INT TERM

part() { # NAME COMMAND...: runs it within its time, appends its output to the log, prints the end
  local name=$1 start=$SECONDS offset limit code=0
  shift
  [[ " ${chosen[*]} " == *" $name "* ]] || return 0
  deadline=$((deadline + seconds[$name] + grace))
  limit=$((deadline - grace - SECONDS))
  ((limit >= seconds[$name])) || limit=${seconds[$name]}
  ((limit <= 2 * seconds[$name])) || limit=$((2 * seconds[$name]))
  echo "== $name, at most $limit s" | tee -a "$log"
  offset=$(wc -c <"$log")
  outcome[$name]=stopped
  # The command of a dry run may have arguments.
  # shellcheck disable=SC2086
  [[ -z ${TCURLORA_GPU_DRY_RUN:-} ]] || set -- $TCURLORA_GPU_DRY_RUN "$name" "$@"
  # In the background, since bash handles signals only between commands and while it waits.
  timeout --kill-after=$grace "$limit" "$@" >>"$log" 2>&1 </dev/null &
  child=$!
  wait "$child" || code=$?
  child=
  taken[$name]=$((SECONDS - start))
  last[$name]=$(tail -c "+$((offset + 1))" "$log" | tail -n 1 | tr -cd '[:print:]' | cut -c1-100)
  case $code in
    0) outcome[$name]=passed ;;
    124 | 137) outcome[$name]='TIME-OUT' ;;
    *) outcome[$name]=FAILED ;;
  esac
  tail -c "+$((offset + 1))" "$log" | tail -n 5
  ((code == 0)) || failed=$((failed + 1))
  return $code
}

# Steps of several commands, which timeout can only run in a shell of their own.
install_wheels() {
  rm -rf build/wheels
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target build/wheels "$wheels"/*.whl
}
build() { # for the architecture of this GPU alone: a third of the compile time
  TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || return
  export TORCH_CUDA_ARCH_LIST TCURLORA_BUILD=1
  "$python" setup.py build_ext --inplace
}
kernels() {
  "$python" -m tcurlora_ext doctor && "$python" -c '
from tcurlora_ext import _C
found = _C.build()["kernels"]
if "cuda" not in found:
    raise SystemExit("the extension has kernels for {}, expected cuda too".format(" and ".join(found)))
print("kernels for", " and ".join(found))'
}
export -f install_wheels build kernels

workers=()
! "$python" -c 'import xdist' 2>/dev/null || workers=(-n 12)
pytest=(env TCURLORA_TEST_DEVICE=cuda "$python" -m pytest -v --tb=short --maxfail=50 -p no:cacheprovider)
operator=("${workers[@]}" tests/operator --ignore=tests/operator/test_without_extension.py)
measure=("$python" -m tcurlora_ext bench --gpu --device cuda --rounds 20 --output "$results")
layers='T=8192 training,unetr qkv,unetr out_proj,unetr linear'
small_layers=("$python" -m tcurlora_ext.bench.sanitize --variant 'tcur native')
sanitizer=$(command -v compute-sanitizer || ls -d "${CUDA_HOME:-/usr/local/cuda}"/{bin,compute-sanitizer}/compute-sanitizer \
  /usr/local/cuda*/{bin,compute-sanitizer}/compute-sanitizer 2>/dev/null | head -n 1)
# In this project's own kernels, all of which are instances of steps_of; without the caching allocator, in whose pool an
# access beyond a tensor would go unnoticed.
sanitize=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer:-compute-sanitizer}" --error-exitcode 1
  --target-processes application-only --kernel-regex kns=steps_of --tool)

deadline=$SECONDS
echo "at most $total s: $(IFS=, && echo "${plan[*]}")" | tee -a "$log"
part wheels bash -c install_wheels
part build bash -c build || exit 1
part kernels bash -c kernels || exit 1
part smoke "${small_layers[@]}"
part cuda "${pytest[@]}" tests/operator/test_cuda.py -k 'not triton'
part operator "${pytest[@]}" "${operator[@]}" --ignore=tests/operator/test_cuda.py -k 'not triton'
part bench "${measure[@]}" --cases "$layers" --variants 'tcur eager,tcur native'
part triton "${pytest[@]}" "${operator[@]}" -k triton
part bench-triton "${measure[@]}" --cases "$layers" --variants 'tcur triton'
part memcheck "${sanitize[@]}" memcheck "${small_layers[@]}"
part racecheck "${sanitize[@]}" racecheck "${small_layers[@]}"
part profile "$python" -m tcurlora_ext.bench.profile 'llama-3-8b q,o' --tokens 8192 --rank 4 --dtype bfloat16 --device cuda \
  --output "$results"
part networks "${measure[@]}" --cases 'unetr encoder,unetr step,llama-7b block,T=8192 inference' \
  --variants 'adapter first,peft,tcur eager,tcur native,tcur triton,dense'
part compiled "${measure[@]}" --cases 'T=8192 training' --variants compiled
part set "${measure[@]}"
exit $((failed > 0))
