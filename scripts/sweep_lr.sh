#!/usr/bin/env bash
# Train one model at several learning rates and compare what comes out.
#   scripts/sweep_lr.sh OUT MODEL [flags of continual-pretrain …]
# RATES lists the learning rates. Run it again to go on where it was stopped.
set -euo pipefail
out=$1 model=$2
shift 2
rates=${RATES:-1e-6 3e-6 1e-5 3e-5 1e-4 3e-4 1e-3}
# shellcheck disable=SC2086 # RATES is several words
exec python "$(dirname "$0")/sweep_lr.py" "$out" $rates -- \
  --model_name_or_path "$model" --do_train --do_eval --lr_scheduler_type linear \
  --logging_steps 10 --save_total_limit 1 "$@"
