#!/usr/bin/env bash
# Static checks: format, lint, types. Stops at the first that fails.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
bash scripts/setup.sh
unset PYTHONHOME PYTHONPATH

run() {
  echo "+ $*"
  .venv/bin/python -m "$@"
}
run ruff format --check .
run ruff check .
run mypy
echo "+ lint-imports"
.venv/bin/lint-imports --no-logo
