#!/usr/bin/env bash
# Sets up aixsim in .venv with its development tools, and passes the tests. Safe to run twice.
# --quick: without what runs the command line, minutes less. Other arguments go to pytest:
# scripts/test.sh tests/aixsim_cli
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup_venv '.[dev]'

tier=()
if [ "${1:-}" = --quick ]; then
  tier=(-m "not slow")
  shift
fi
started=$SECONDS
ruff check .
ruff format --check .
pyright
# a file stays in one process: its fixtures train models
pytest -n 2 --dist loadfile "${tier[@]}" "$@"
cat <<END

Passed in $((SECONDS - started)) s: lint, format, types and tests. The environment is .venv.
Try next:
  bash scripts/quickstart.sh          the main job, in minutes
  source .venv/bin/activate && aixsim --help
END
