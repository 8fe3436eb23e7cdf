#!/usr/bin/env bash
# The long half of the fault tests: 20 kills, dead ranks, changes of layout, fuzzing, a soak.
# Under 30 minutes on 2 cores. Arguments go to pytest. Expects the environment of scripts/test.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${VIRTUAL_ENV:-}" ] || source .venv/bin/activate
AIXSIM_TEST_LONG=1 AIXSIM_TEST_KILLS=20 pytest --timeout 900 --durations 10 tests/faults tests/distributed "$@"
