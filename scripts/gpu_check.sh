#!/usr/bin/env bash
# Every check that needs an accelerator: the kernels' tests, which there compare Triton with the
# CPU's; times of the kernels against torch and, where installed, other simulators; memory; the
# parts of a step; and the throughput of optical against digital pretraining, one table at the end.
# Without an accelerator it is a rehearsal: the same commands with small shapes on the CPU, and every
# launch compiled for a GPU that is not there. That checks the script, and measures nothing.
#   scripts/gpu_check.sh [OUT] [FLAVOR …]         default: outputs/gpu_check 60M
# Needs an environment with aixsim installed (or PYTHONPATH=.:kernels); no network.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/gpu_check}
shift || true
flavors=("${@:-60M}")
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH}
aixsim() { python3 -m aixsim_cli "$@"; }

mkdir -p "$out"
device=$(python3 -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
if [ "$device" = cuda ]; then
  tests=(tests/aixsim_kernels) shapes=(--tokens 98304 --length 2048)
  lengths=(1024 2048 4096 8192) batch=48 memory_batch=8 length=2048 steps=40 layers=() pairs=9 log=10
else
  echo "gpu_check: no accelerator, a rehearsal: no number below counts" >&2
  tests=(tests/aixsim_kernels/test_on_gpu.py tests/aixsim_kernels/test_launches.py)
  shapes=(--tokens 64 --length 32) lengths=(32) batch=1 memory_batch=1 length=64 steps=2 layers=(--layers 1) pairs=2 log=1
fi
kernels=passed
python3 -m pytest -q "${tests[@]}" >"$out/kernels.log" 2>&1 || kernels=FAILED
python3 scripts/bench_kernels.py --flavors "${flavors[@]}" --device "$device" --dtype bfloat16 \
  "${shapes[@]}" --pairs $pairs --peers --json "$out/kernels.json"
python3 scripts/bench_memory.py --device "$device" --dtype bfloat16 --batch $memory_batch --length $length \
  --lengths "${lengths[@]}"
for flavor in "${flavors[@]}"; do
  python3 scripts/profile_step.py --flavor "$flavor" "${layers[@]}" --batch $batch \
    --length $length --pairs $pairs
done

for flavor in "${flavors[@]}"; do
  for name in digital optical; do
    transform=()
    [ $name = digital ] || transform=(--transform-config configs/transforms/optical.yaml)
    aixsim generate-cfg --model-flavor "$flavor" --tokenizer-path builtin --dataset builtin \
      --batch-size $batch --seq-len $length --steps $steps "${transform[@]}" \
      --compile "$([ "$device" = cuda ] && echo true || echo false)" \
      --save-path "$out/$flavor-$name.yaml" --force >/dev/null
    rm -rf "${out:?}/$flavor-$name"
    aixsim pretrain --config "$out/$flavor-$name.yaml" --job.dump_folder "$out/$flavor-$name" \
      --checkpoint.enable false --metrics.log_freq $log
  done
done

python3 - "$out" "$kernels" "${flavors[@]}" <<'PY'
import json, sys
from pathlib import Path

import torch

out, kernels, flavors = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu (nothing measured here counts)"
print(f"device: {name}; torch {torch.__version__}; kernel tests: {kernels}\n")
print("| flavor | hardware | tokens/s, last 20 steps | step time to digital | loss, last step |")
print("|---|---|---|---|---|")
for flavor in flavors:
    rate = {}
    for kind in ("digital", "optical"):
        lines = (out / f"{flavor}-{kind}" / "metrics.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        rate[kind] = sum(r["tokens_per_second"] for r in log[-2:]) / 2
        ratio = rate["digital"] / rate[kind]
        print(f"| {flavor} | {kind} | {rate[kind]:,.0f} | {ratio:.2f} | {log[-1]['loss']:.4f} |")
PY
[ $kernels = passed ]
