#!/usr/bin/env bash
# Train a digital model further on optical hardware, on 0.22 tokens per parameter.
#   scripts/finetune_optical.sh [num_processes] [model] [batch] [lr] [weight_decay] [accumulation] [block_size] [more flags …]
# TRANSFORM, DATASET (flags that name the text) and OUTPUT replace what is set below.
set -euo pipefail
processes=${1:-1} model=${2:-AICrossSim/clm-60m} batch=${3:-8} rate=${4:-2e-5}
decay=${5:-0.01} accumulation=${6:-2} block=${7:-1024}
shift $(($# < 7 ? $# : 7))
here=$(cd "$(dirname "$0")/.." && pwd)
transform=${TRANSFORM:-$here/configs/transforms/optical.yaml}
dataset=${DATASET:---dataset_name HuggingFaceFW/fineweb-edu --dataset_config_name sample-10BT --streaming}
output=${OUTPUT:-output/$(basename "$model")-$(basename "$transform" .yaml)-lr$rate}

launcher=(aixsim)
((processes == 1)) || launcher=(torchrun --standalone --nproc-per-node "$processes" --no-python aixsim)

# shellcheck disable=SC2086 # DATASET is several words
"${launcher[@]}" continual-pretrain \
  --model_name_or_path "$model" $dataset --transform_config "$transform" --do_train \
  --token_num_scale 0.22 --block_size "$block" --per_device_train_batch_size "$batch" \
  --per_device_eval_batch_size "$batch" --gradient_accumulation_steps "$accumulation" \
  --learning_rate "$rate" --weight_decay "$decay" --lr_scheduler_type linear \
  --logging_steps 50 --save_total_limit 2 --output_dir "$output" "$@"
