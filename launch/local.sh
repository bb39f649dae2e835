#!/usr/bin/env bash
# Run grab_jax on this machine with all its devices.
#   launch/local.sh --flagfile=experiments/quickstart.flags [overrides]
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
export JAX_COMPILATION_CACHE_DIR="${GRAB_JAX_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/grab_jax/xla}"
cd "$root"
exec "$python" -m grab_jax.main "$@"
