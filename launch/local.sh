#!/usr/bin/env bash
# Run grab_jax on this machine with all its devices.
#   launch/local.sh [--dry-run] --flagfile=experiments/quickstart.flags [overrides]
# Environment: PYTHON (default: .venv/bin/python, else python3), GRAB_JAX_CACHE (compilation cache folder).
set -euo pipefail

if [[ "${1:-}" == "--help" || $# -eq 0 ]]; then
  sed -n '2,4s/^# \{0,1\}//p' "$0"
  exit 0
fi

root="$(cd "$(dirname "$0")/.." && pwd)"
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  if [[ -x "$root/.venv/bin/python" ]]; then python="$root/.venv/bin/python"; else python=python3; fi
fi
if [[ "$1" == "--dry-run" ]]; then
  printf 'cd %q\n' "$root"
  printf '%q ' "$python" -m grab_jax.main "${@:2}"
  echo
  exit 0
fi
cd "$root"
exec "$python" -m grab_jax.main "$@"
