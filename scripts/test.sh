#!/usr/bin/env bash
# The tests: sets up .venv if need be and runs pytest. Arguments are passed on to pytest.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
bash scripts/setup.sh

# The browser tests drive a system browser and are skipped without one. It is installed here only where that
# asks nobody: as root on Debian (containers, CI).
# So is PostgreSQL, for the test of an MLflow server on it.
has() { command -v "$1" >/dev/null 2>&1; }
install() { # package, what for
  { has apt-get && [ "$(id -u)" = 0 ]; } || return 0
  echo "test: installing $1 for the $2 tests" >&2
  log=$(mktemp)
  if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$1"; } \
    >"$log" 2>&1 </dev/null; then
    tail -n 5 "$log" >&2
    echo "test: $1 could not be installed; the $2 tests will be skipped" >&2
  fi
  rm -f "$log"
}
has chromium || has chromium-browser || has google-chrome || has google-chrome-stable || install chromium browser
has postgres || ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || install postgresql PostgreSQL

unset PYTHONHOME PYTHONPATH
[ $# -eq 0 ] || exec .venv/bin/python -m pytest "$@"

# All of them: two halves at once, since much of the time goes into waiting for servers and disks. The first half is
# what starts processes of its own, and what hardly computes.
first=(tests/e2e)
for name in alive cli doctor resume sync trust writer; do first+=("tests/test_$name.py"); done
log=$(mktemp)
trap 'kill "$half" 2>/dev/null || true; rm -f "$log"' EXIT
.venv/bin/python -m pytest --color=no "${first[@]}" >"$log" 2>&1 &
half=$!
failed=0
.venv/bin/python -m pytest "${first[@]/#/--ignore=}" || failed=$?
wait "$half" || failed=$?
cat "$log"
exit "$failed"
