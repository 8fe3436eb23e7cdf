#!/usr/bin/env bash
# What bit-flips cost a model that never saw them, one that was trained with them from scratch, and
# the first one after low-rank updates were trained with them.
#   scripts/compare_bitflip.sh TRAIN.txt HELDOUT.txt OUT [P] [SEQ_LEN] [BATCH] [STEPS] [SEED]
# Every bit of the linear layers' inputs and weights flips with probability P. The table of
# docs/results.md is what it prints at the end.
set -euo pipefail
train=$1 heldout=$2 out=$3 p=${4:-0.01} seq_len=${5:-1024} batch=${6:-4} steps=${7:-500} seed=${8:-42}
mkdir -p "$out"
cat >"$out/faulty-hardware.yaml" <<YAML
transform: bitflip
layer_name_to_config:
  default: {x_p_exp: $p, x_p_frac: $p, x_zero_out_t: 30.0, w_p_exp: $p, w_p_frac: $p, w_zero_out_t: 1.25}
YAML

sed '$a lora: {r: 32, alpha: 32}' "$out/faulty-hardware.yaml" >"$out/faulty-hardware-lora.yaml"

for name in clean flips lora; do
  if [ $name = lora ]; then
    rm -rf "$out/lora-hf"
    aixsim continual-pretrain --do_train --model_name_or_path "$out/clean-hf" --train_file "$train" \
      --transform_config "$out/faulty-hardware-lora.yaml" --block_size "$seq_len" \
      --per_device_train_batch_size "$batch" --max_steps $((steps / 2)) --warmup_steps $((steps / 10)) \
      --learning_rate 2e-3 --lr_scheduler_type cosine --seed "$seed" --save_strategy no \
      --output_dir "$out/lora-hf"
  else
    transform=()
    [ $name = clean ] || transform=(--transform-config "$out/faulty-hardware.yaml")
    aixsim generate-cfg --model-flavor debug --tokenizer-path builtin --dataset local \
      --dataset-path "$train" --batch-size "$batch" --seq-len "$seq_len" --steps "$steps" \
      --learning-rate 3e-3 --seed "$seed" --mixed-precision-param float32 "${transform[@]}" \
      --save-path "$out/$name.yaml" --force
    aixsim pretrain --config "$out/$name.yaml" --job.dump_folder "$out/$name"
    aixsim convert-ckpt aixsim debug "$out/$name/checkpoint/step-$steps" "$out/$name-hf" --force
  fi
  data=(--dataset local --dataset-path "$heldout" --json)
  aixsim eval ppl "$out/$name-hf" "${data[@]}" --no-transform >"$out/$name-sound.json"
  aixsim eval ppl "$out/$name-hf" "${data[@]}" --transform-config "$out/faulty-hardware.yaml" \
    >"$out/$name-faulty.json"
done

python - "$out" <<'PY'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
results = {path.stem: json.loads(path.read_text()) for path in out.glob("*-*.json")}
base = results["clean-sound"]["nll"]
lost = results["clean-faulty"]["nll"] - base
print("| trained | evaluated on | held-out loss | perplexity | cost (nats) | of the cost recovered |")
print("|---|---|---|---|---|---|")
for trained in ("clean", "flips", "lora"):
    for hardware in ("sound", "faulty"):
        row = results[f"{trained}-{hardware}"]
        cost = row["nll"] - base
        back = f"{1 - cost / lost:.0%}" if trained != "clean" and hardware == "faulty" else "–"
        print(f"| {trained} | {hardware} | {row['nll']:.4f} | {row['perplexity']:.2f} | {cost:+.4f} | {back} |")
PY
