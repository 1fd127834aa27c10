#!/usr/bin/env bash
# Proves the GPU code on this machine: build, tests, sanitizer, benchmark; results into a folder. Needs no network.
#
#   bench/gpu_proof.sh OUT                      under 9 minutes; OUT/summary.json says what passed
#   bench/gpu_proof.sh OUT build benchmark      some parts alone, with all the time that there is
#
# Uses the python3 that is on the PATH with its torch and Triton. Each part has its own limit, and a part that fails
# does not keep the next from running.
set -uo pipefail
: "${1:?usage: bench/gpu_proof.sh OUT}"
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
only="$*"
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_COMPILE_THREADS=4
parts=()
$python -c 'import torch; assert torch.cuda.is_available()' || { echo "gpu proof: torch finds no GPU" >&2; exit 2; }

part() { # name, seconds
    local name=$1 limit=$2 start=$SECONDS rc
    if [ -n "$only" ]; then
        [[ " $only " == *" $name "* ]] || return
        limit=540
    fi
    timeout --signal=INT --kill-after=10 "$limit" bash -c "$name" >"$out/$name.log" 2>&1
    rc=$?
    parts+=("{\"part\": \"$name\", \"rc\": $rc, \"seconds\": $((SECONDS - start))}")
    echo "gpu proof: $name: rc $rc, $((SECONDS - start)) s"
    tail -n 3 "$out/$name.log"
}

build() {
    # The Python part is all of Triton's; C++ and CUDA C++, for this GPU alone, where pybind11 and ninja are there.
    cp -r python/flashpair "$site/" && cp -r kernels "$site/flashpair/kernels" || return 1
    TORCH_CUDA_ARCH_LIST=$($python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    export TORCH_CUDA_ARCH_LIST
    timeout 90 $python -m pip install --quiet --no-index --no-build-isolation --no-deps --upgrade --target "$site" . ||
        echo "without the compiled extensions"
    $python -m flashpair info
    $python -c 'import torch
from flashpair.dispatch import obstacles
from flashpair.onchip import limits
reasons = obstacles("onchip", torch.device("cuda")) or [r for r in [limits(0)] if isinstance(r, str)]
raise SystemExit("; ".join(reasons))'
}

tests() {
    local workers=()
    $python -c 'import xdist' 2>/dev/null && workers=(-n 8)
    $python -m pytest -q -o addopts=--strict-markers -p no:cacheprovider "${workers[@]}" -m gpu \
        tests/test_gpu.py tests/test_gpu_onchip.py tests/test_gpu_sifted.py
}

sanitizer() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not here"
        return 3
    fi
    # Without torch's cache every tensor is an allocation of its own, so that reading past its end is seen.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    local check=(compute-sanitizer --report-api-errors no --error-exitcode 9)
    $python bench/gpu_small.py &&
        "${check[@]}" --tool memcheck $python bench/gpu_small.py &&
        "${check[@]}" --tool racecheck $python bench/gpu_small.py MultiSimilarityLoss
}

benchmark() {
    local rc=0
    run() { $python -m bench --device cuda --repeats 5 --time-limit 8 --out "$out/bench" "$@" || rc=1; }
    run --dtype bfloat16 --dims 128,256 --sizes 8192,65536,131072 --variants flashpair,floor
    run --dtype bfloat16 --data trained --sizes 8192,65536 --variants flashpair-screened,flashpair-fused,floor
    run --dtype bfloat16 --dims 128,256 --sizes 65536 --phase forward --variants flashpair,floor
    run --dtype bfloat16 --dims 512,768,1024 --sizes 65536 --variants flashpair,floor
    run --dtype float32 --dims 64,128 --sizes 8192,65536 --variants flashpair,floor
    run --sizes 8192 --variants flashpair,reference,pytorch-metric-learning,floor
    run --dtype bfloat16 --sizes 8192,32768 --variants flashpair,compiled,floor
    run --dtype bfloat16 --loss ms_weighting --sizes 32768 --variants flashpair,flex-attention,floor
    small() { run --sizes 32,64,128,256,512,1024 --time-limit 2 "$@"; }
    small --variants flashpair-onchip,flashpair-fused,reference,compiled-max-autotune,pytorch-metric-learning
    small --phase host --variants flashpair-onchip,flashpair-fused,reference
    small --phase device --variants flashpair-onchip,flashpair-fused,reference,floor
    run --loss n_pairs --sizes 32768 --variants flashpair,inf-cl,floor
    grep -l '"status": "wrong"' "$out"/bench/*.json && rc=1
    return $rc
}

export -f build tests sanitizer benchmark
export out python site
export PYTHONPATH=$site
part build 120
part tests 170
part sanitizer 100
part benchmark 130
[ -d "$out/bench" ] && tar -czf "$out/bench.tar.gz" -C "$out" bench
printf '{"parts": [%s]}\n' "$(IFS=,; echo "${parts[*]}")" >"$out/summary.json"
cat "$out/summary.json"
! grep -q '"rc": [1-9]' "$out/summary.json"
