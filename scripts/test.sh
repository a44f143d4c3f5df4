#!/usr/bin/env bash
# The tests: sets up .venv if need be and runs pytest. Arguments are passed on to pytest.
#   bash scripts/test.sh           the quick ones: everything that needs no other process
#   bash scripts/test.sh --long    those marked long: processes, servers, a browser, a full disk
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
if [ "${1:-}" = --long ]; then
  has chromium || has chromium-browser || has google-chrome || has google-chrome-stable || install chromium browser
  has postgres || ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || install postgresql PostgreSQL
fi

# Another environment's settings must not reach into this one; and what is compiled once is kept for every process.
unset PYTHONHOME PYTHONPATH PYTHONDONTWRITEBYTECODE
# A file's tests stay in one process: what a file makes for all of its tests is made once.
both=(-n 2 --dist loadfile)
case "${1:-}" in
  "")
    export OMP_NUM_THREADS=1 # for each of the two
    set -- "${both[@]}"
    ;;
  --long) set -- "${both[@]}" -m "long and not slow and not nightly" "${@:2}" ;;
esac
exec .venv/bin/python -m pytest "$@"
