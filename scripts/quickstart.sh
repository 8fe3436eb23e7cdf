#!/usr/bin/env bash
# Sets up aixsim in .venv and runs the main job on the built-in text, on a CPU, in minutes:
# an optical language model is pretrained from scratch, converted, evaluated and sampled.
# Safe to run twice: a finished step is not done again.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup_venv .

run=outputs/quickstart
started=$SECONDS
step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

step "generate-cfg: a config for the smallest model, with optical hardware"
aixsim generate-cfg --model-flavor debug --tokenizer-path builtin --dataset builtin \
  --transform-config configs/transforms/optical.yaml --batch-size 8 --seq-len 256 --steps 200 \
  --learning-rate 3e-3 --mixed-precision-param float32 \
  --save-path $run/config.yaml --force

step "pretrain: from scratch, on the Python documentation of this machine"
aixsim pretrain --config $run/config.yaml --job.dump_folder $run/optical --metrics.log_freq 20

step "convert-ckpt: to a Hugging Face folder"
aixsim convert-ckpt aixsim debug $run/optical/checkpoint/step-200 $run/hf --force

step "eval ppl: perplexity on the held-out part"
aixsim eval ppl $run/hf --dataset builtin --num-batches 20

step "generate-hf: a sentence"
aixsim generate-hf $run/hf --prompt "The function returns" --max-new-tokens 40 \
  --do-sample true --temperature 0.7 --top-k 50 --top-p 0.9 --seed 0

step "loss by step"
python - "$run/optical/metrics.jsonl" <<'PY'
import json, sys

records = {r["step"]: r for r in map(json.loads, open(sys.argv[1]))}
top = max(r["loss"] for r in records.values())
for step, r in sorted(records.items()):
    print(f"{step:5d}  {r['loss']:.3f}  {'#' * round(50 * r['loss'] / top)}")
PY

cat <<END

Done in $((SECONDS - started)) s. You made:
  $run/config.yaml                   the run: torchtitan's sections and the transform
  $run/optical/checkpoint/step-200   torchtitan checkpoint, weights and optical ranges
  $run/optical/metrics.jsonl         loss, gradient norm, tokens/s of every logged step
  $run/hf                            Hugging Face folder, loads with AutoModelForCausalLM
Try next (source .venv/bin/activate):
  aixsim eval ppl $run/hf --no-transform           the same weights on digital hardware
  aixsim pretrain --config $run/config.yaml --job.dump_folder $run/optical --training.steps 400
                                                   resumes where this run ended
  aixsim pretrain --help
END
