#!/usr/bin/env bash
# The tests: sets up .venv if need be and runs pytest. Arguments are passed on to pytest.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
bash scripts/setup.sh

# The browser tests drive a system browser and are skipped without one. It is installed here only where that
# asks nobody: as root on Debian (containers, CI).
has() { command -v "$1" >/dev/null 2>&1; }
if ! has chromium && ! has chromium-browser && ! has google-chrome && ! has google-chrome-stable &&
  has apt-get && [ "$(id -u)" = 0 ]; then
  echo "test: installing chromium for the browser tests" >&2
  log=$(mktemp)
  if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } \
    >"$log" 2>&1 </dev/null; then
    tail -n 5 "$log" >&2
    echo "test: chromium could not be installed; the browser tests will be skipped" >&2
  fi
  rm -f "$log"
fi

unset PYTHONHOME PYTHONPATH
exec .venv/bin/python -m pytest "$@"
