#!/usr/bin/env bash
# Every check that needs an accelerator: the kernels' tests, which there compare Triton with the
# reference; times of the kernels against torch and, where installed, other simulators; memory; the
# parts of a step; and the throughput of optical against digital pretraining, one table at the end.
# Without an accelerator it runs on the CPU, which checks the script and nothing else.
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
kernels=passed
python3 -m pytest -q tests/aixsim_kernels >"$out/kernels.log" 2>&1 || kernels=FAILED
device=$(python3 -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
if [ "$device" = cuda ]; then
  python3 scripts/bench_kernels.py --device cuda --dtype bfloat16 --tokens 98304 --length 2048 --peers
  python3 scripts/bench_memory.py --device cuda --dtype bfloat16 --batch 8
  for flavor in "${flavors[@]}"; do
    python3 scripts/profile_step.py --flavor "$flavor" --batch 8 --length 2048
  done
fi

for flavor in "${flavors[@]}"; do
  for name in digital optical; do
    transform=()
    [ $name = digital ] || transform=(--transform-config configs/transforms/optical.yaml)
    aixsim generate-cfg --model-flavor "$flavor" --tokenizer-path builtin --dataset builtin \
      --batch-size 8 --seq-len 2048 --steps 40 --compile true "${transform[@]}" \
      --save-path "$out/$flavor-$name.yaml" --force >/dev/null
    rm -rf "${out:?}/$flavor-$name"
    aixsim pretrain --config "$out/$flavor-$name.yaml" --job.dump_folder "$out/$flavor-$name" \
      --checkpoint.enable false --metrics.enable_tensorboard
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
