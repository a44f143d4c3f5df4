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

# All of them, in three parts at once, since much of the time goes into waiting for processes, servers and disks. What is
# in no list is in the last part.
real=(tests/e2e tests/test_launchers.py)
runs=()
for name in alive benchmark cli doctor models_in_mlflow resume search sweeps sync trust writer; do
  runs+=("tests/test_$name.py")
done
logs=$(mktemp -d)
parts=()
trap 'kill "${parts[@]}" 2>/dev/null || true; rm -rf "$logs"' EXIT
part() { # name, paths: a part in the background
  .venv/bin/python -m pytest --color=no "${@:2}" >"$logs/$1" 2>&1 &
  parts+=($!)
}
part real "${real[@]}"
part runs "${runs[@]}"
failed=0
.venv/bin/python -m pytest "${real[@]/#/--ignore=}" "${runs[@]/#/--ignore=}" || failed=$?
for process in "${parts[@]}"; do
  wait "$process" || failed=$?
done
cat "$logs/real" "$logs/runs"
exit "$failed"
