#!/usr/bin/env bash
# Makes .venv at the root of the repository: everything in constraints.txt, hash-checked, and mlmx itself, editable.
# The other scripts call this first; when nothing has changed it returns at once. Uses uv where there is one,
# else venv and pip. Written for bash 3.2 too, which is what macOS has.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
# Another environment's settings must not reach into this one.
unset PYTHONHOME PYTHONPATH VIRTUAL_ENV CONDA_PREFIX

stamp=.venv/.mlmx-stamp
cuda='nvidia-.*|cuda-.*|triton' # what only CUDA builds of torch need, as named in constraints.txt

say() { echo "setup: $*" >&2; }
fail() { say "$*"; exit 1; }

# What a finished .venv has in its stamp: where it is and for which Python, then what was installed.
place() { pwd -P && .venv/bin/python -V 2>/dev/null; }
wanted() { place && cat pyproject.toml constraints.txt scripts/setup.sh | cksum; }
ready() { [ -f "$stamp" ] && want=$(wanted) && [ "$(cat "$stamp")" = "$want" ]; }

ready && exit 0

uv=uv
uv --version >/dev/null 2>&1 || uv=

# A name on PATH may be a stub for a Python that is not there, so each is run. Without uv it also needs ensurepip.
python='' seen=''
for name in python3 python3.13 python3.12 python3.11; do
  if version=$("$name" -c '
import sys
print("%d.%d" % sys.version_info[:2])
if sys.version_info < (3, 11): sys.exit(1)
if sys.argv[1] == "": import ensurepip, venv
' "$uv" 2>/dev/null); then python=$name; break; fi
  [ -z "$version" ] || seen="$seen $name is $version;"
done
[ -n "$python" ] || fail "needs Python >= 3.11 with venv and pip (or uv), found:${seen:- none;} looked for python3, python3.13, python3.12, python3.11"

# One setup at a time. The lock belongs to the open file, not to the process that takes it, and so lasts until
# this script ends (macOS has no flock command).
exec 9>.venv.lock
"$python" -c 'import fcntl
try: fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("setup: waiting for another setup to finish", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)' >&2
ready && exit 0

# Start over where an earlier setup was cut off, or .venv was moved here or has lost its Python. A finished one is
# brought up to date in place, and so is one that was made by hand (no stamp).
if [ -f "$stamp" ] && ! { at=$(place) && [ "$(head -n 2 "$stamp")" = "$at" ]; }; then
  say "making .venv anew"
  rm -rf .venv
fi
if [ ! -e .venv ]; then
  mkdir .venv
  echo unfinished >"$stamp"
  if [ -n "$uv" ]; then
    uv venv --quiet --allow-existing --python "$(command -v "$python")" .venv || fail "uv venv failed"
  else
    "$python" -m venv .venv || fail "$python -m venv failed"
  fi
fi
.venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail ".venv has no working Python >= 3.11; move it away and run this again"
[ ! -f "$stamp" ] || echo unfinished >"$stamp"

if [ -n "$uv" ]; then
  # The wheels that pip would consider, uv considers too (pip separates them by spaces, uv by commas).
  if [ -n "${PIP_FIND_LINKS:-}" ] && [ -z "${UV_FIND_LINKS:-}" ]; then
    UV_FIND_LINKS=$(echo "$PIP_FIND_LINKS" | tr -s ' ' ',')
    export UV_FIND_LINKS
  fi
  pip() { local command=$1; shift; uv pip "$command" --python .venv/bin/python "$@"; }
  quiet=-q
else
  pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
  quiet=-qq # errors only, no warnings about the machine's own pip settings
fi
# No dependency resolution: constraints.txt is complete. No build isolation: build tools come from it as well.
install() { pip install $quiet --no-deps --no-build-isolation "$@"; }
locked() { install --require-hashes -r "$1" || fail "installing the packages of constraints.txt failed (see above)"; }

# The entries of constraints.txt whose names match $1 ($2 = 1) or do not ($2 = 0).
part() { awk -v names="^($1)==" -v keep="$2" '/^[A-Za-z0-9]/ { on = ($0 ~ names ? 1 : 0) == keep } on' constraints.txt; }

say "installing into .venv with ${uv:-pip}; the first time this takes some minutes"

# pip itself, and setuptools for the one source distribution among the packages.
part 'pip|setuptools' 1 >.venv/.mlmx-tools.txt
locked .venv/.mlmx-tools.txt

# Then torch. A CPU build at hand (2.x.y+cpu) counts as newer than the index's build of the same version, which is
# a CUDA build on Linux. But pip and uv know hashes by the pinned version only, and so would not take it: ask which
# builds they see, and pin the newest. Its hash must be in constraints.txt all the same.
torch=$(part torch 1 | sed -n 's/^torch==\([^ ;]*\).*/\1/p')
if [ -n "$uv" ]; then
  builds=$(NO_COLOR=1 pip install --dry-run --reinstall --no-deps "torch==$torch" 2>&1) || fail "$builds"
else
  builds=$(pip index versions torch 2>&1) || fail "$builds"
fi
build=$(echo "$builds" | tr -c 'A-Za-z0-9.+\n' '\n' | awk -v v="$torch" '$0 == v || index($0, v "+") == 1 { print; exit }')
[ -n "$build" ] || fail "torch $torch is not to be had for $(.venv/bin/python -V): $builds"
part torch 1 | sed "s/^torch==[^ ;]*/torch==$build/" >.venv/.mlmx-torch.txt
locked .venv/.mlmx-torch.txt

# The CUDA packages, where this build of torch asks for them, and all the others.
if .venv/bin/python -c '
import importlib.metadata, re, sys
needs = importlib.metadata.requires("torch") or []
sys.exit(not any(re.match(sys.argv[1], need) for need in needs))' "$cuda"; then
  part "torch" 0 >.venv/.mlmx-rest.txt
else
  part "torch|$cuda" 0 >.venv/.mlmx-rest.txt
fi
locked .venv/.mlmx-rest.txt

install --editable . || fail "installing mlmx itself failed (see above)"
.venv/bin/python -m compileall -q src || true # as of the other packages, also where Python is told to write none
conflicts=$(pip check 2>&1) || fail "the installed packages do not fit together: $conflicts"

wanted >"$stamp.new"
mv "$stamp.new" "$stamp"
say "done"
