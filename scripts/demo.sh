#!/usr/bin/env bash
# The demo: sets up .venv if need be and runs experiment=demo. Arguments are passed on as Hydra overrides.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
bash scripts/setup.sh
unset PYTHONHOME PYTHONPATH
exec .venv/bin/python -m mlmx train experiment=demo "$@"
