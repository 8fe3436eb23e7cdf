#!/usr/bin/env bash
# Every long test, with the quick ones of the same files: 20 kills, dead ranks, changes of layout,
# fuzzing, a soak; the quickstart; the walk over all text model types; every kernel launch for three GPUs
# with three versions of Triton; the rehearsal of the GPU check.
# Arguments go to pytest. Expects the environment of scripts/test.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${VIRTUAL_ENV:-}" ] || source .venv/bin/activate
# a file stays in one process: its fixtures train models
AIXSIM_TEST_LONG=1 AIXSIM_TEST_KILLS=20 pytest -n 2 --dist loadfile --timeout 900 --durations 10 \
    tests/faults tests/distributed tests/aixsim_cli/models/hf/test_clients.py \
    tests/aixsim_cli/models/hf/test_walk.py tests/aixsim_kernels/test_launches.py \
    tests/aixsim_kernels/optical tests/e2e/test_readme.py tests/e2e/test_gpu_check.py "$@"
