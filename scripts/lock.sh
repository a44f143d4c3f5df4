#!/usr/bin/env bash
# Rewrites constraints.txt: every package of the project and its extras, for all platforms and Python >= 3.11,
# pinned and with sha256 hashes. Keeps the pins it has unless told otherwise:
#   bash scripts/lock.sh                         follow pyproject.toml, change as little as possible
#   bash scripts/lock.sh --upgrade               everything to its newest (the list below stays)
#   bash scripts/lock.sh --upgrade-package NAME  one package
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."

# The versions this project is tested against; change them here.
pins() {
  cat <<'PINS'
accelerate==1.15.0
datasets==5.2.0
hydra-core==1.3.8
mlflow==3.17.2
omegaconf==2.3.1
tokenizers==0.23.3
torch==2.13.0
transformers==5.23.0
PINS
}

# The official CPU builds of torch (local version +cpu) satisfy torch==2.13.0 but are not on the main package
# index, so the resolver cannot hash them; their sums stand here, from the wheels themselves (sha256sum FILE.whl).
torch_version=2.13.0
torch_cpu_sums='
6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b  torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl
'

uv=.venv/bin/uv # from scripts/setup.sh
[ -x "$uv" ] || uv=uv
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

pins >"$work/pins.txt"
added=$(echo "$torch_cpu_sums" | awk 'NF { print $1 }')
[ ! -f constraints.txt ] || grep -vF "$added" constraints.txt >"$work/lock.txt"
# Local wheels must not decide what the lock says.
unset PIP_FIND_LINKS UV_FIND_LINKS
"$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
  --all-extras --constraint "$work/pins.txt" --output-file "$work/lock.txt" "$@" pyproject.toml

grep -q "^torch==$torch_version " "$work/lock.txt" || { echo "lock.sh: torch is no longer $torch_version: renew torch_cpu_sums" >&2; exit 1; }
{
  echo '# Every package mlmx is tested with, pinned and hashed: run time, demo, test and dev extras.'
  echo '# Written by: bash scripts/lock.sh (after a change of pyproject.toml, or with --upgrade). Do not edit.'
  echo '# scripts/setup.sh installs it with hash checking. torch also has the hash of:'
  echo "$torch_cpu_sums" | awk 'NF { print "#   CPU build " $2 }'
  awk -v sums="$torch_cpu_sums" '
    BEGIN { n = split(sums, word, /[ \n]+/) }
    { print }
    /^torch==/ { for (i = 1; i <= n; i++) if (length(word[i]) == 64) print "    --hash=sha256:" word[i] " \\" }
  ' "$work/lock.txt"
} >"$work/constraints.txt"
cat "$work/constraints.txt" >constraints.txt
