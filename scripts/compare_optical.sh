#!/usr/bin/env bash
# Digital against optical pretraining from scratch: same model, seed, data and budget.
#   scripts/compare_optical.sh TRAIN.txt HELDOUT.txt OUT [SEQ_LEN] [BATCH] [STEPS] [SEED]
# The table of docs/results.md is what it prints at the end.
set -euo pipefail
train=$1 heldout=$2 out=$3 seq_len=${4:-1024} batch=${5:-4} steps=${6:-500} seed=${7:-42}
here=$(dirname "$0")/..

for name in digital optical optical-rowmax; do
  transform=()
  [ $name = digital ] || transform=(--transform-config "$here/configs/transforms/$name.yaml")
  aixsim generate-cfg --model-flavor debug --tokenizer-path builtin --dataset local \
    --dataset-path "$train" --batch-size "$batch" --seq-len "$seq_len" --steps "$steps" \
    --learning-rate 3e-3 --seed "$seed" --mixed-precision-param float32 "${transform[@]}" \
    --save-path "$out/$name.yaml" --force
  aixsim pretrain --config "$out/$name.yaml" --job.dump_folder "$out/$name"
  aixsim convert-ckpt aixsim debug "$out/$name/checkpoint/step-$steps" "$out/$name-hf" --force
  aixsim eval ppl "$out/$name-hf" --dataset local --dataset-path "$heldout" --json >"$out/$name.json"
done

python - "$out" "$steps" <<'PY'
import json, sys
from pathlib import Path

out, steps = Path(sys.argv[1]), int(sys.argv[2])
rows = {name: json.loads((out / f"{name}.json").read_text()) for name in ("digital", "optical", "optical-rowmax")}
print("| hardware | training loss, last 100 steps | held-out loss | perplexity | to digital | kept mass | seconds |")
print("|---|---|---|---|---|---|---|")
for name, row in rows.items():
    log = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in log if r["step"] > steps - 100]
    loss = sum(r["loss"] for r in last) / len(last)
    kept = f"{last[-1]['attention_kept_mass']:.3f}" if "attention_kept_mass" in last[-1] else "–"
    ratio = row["nll"] / rows["digital"]["nll"] - 1
    print(f"| {name} | {loss:.4f} | {row['nll']:.4f} | {row['perplexity']:.2f} | {ratio:+.2%} | {kept} | {log[-1]['seconds']:.0f} |")
PY
