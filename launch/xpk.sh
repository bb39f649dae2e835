#!/usr/bin/env bash
# Run grab_jax on TPUs of a GKE cluster made with xpk: one pod per host of the slices, the image of the Dockerfile.
#   CLUSTER=c WORKLOAD=w launch/xpk.sh [--dry-run] --tpu-type=v5litepod-16 --docker-image=IMAGE [xpk options] -- \
#     --run_dir=/data/s --attack=span --sweep_seed=0,1,2,3
# Pods are thrown away: let the run folder lie on a volume that all see (xpk storage attach, then --storage=NAME). A pod
# that is stopped saves its state (exit code 130) and goes on after xpk's restart, 10 of them unless you give
# --max-restarts. Environment: CLUSTER (made by xpk), WORKLOAD (a new name: small letters, digits and -).
set -euo pipefail

if [[ "${1:-}" == "--help" || $# -eq 0 ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0"
  exit 0
fi

dry=false folder="" options=()
if [[ "$1" == "--dry-run" ]]; then dry=true && shift; fi
for ((i = 1; i <= $#; i++)); do
  if [[ "${!i}" == "--" ]]; then options=("${@:1:i-1}") && shift "$i" && break; fi
done
for value in "$@"; do
  if [[ "$value" == --run_dir=/?* ]]; then folder="${value#*=}"; fi
done
if [[ -z "${CLUSTER:-}" || -z "${WORKLOAD:-}" || -z "$folder" || "$*" == *$'\n'* ]]; then
  echo "launch/xpk.sh: set CLUSTER and WORKLOAD, and give --run_dir=/FOLDER on their volume, and no line break; got" \
    "CLUSTER=${CLUSTER:-} WORKLOAD=${WORKLOAD:-} --run_dir=$folder" >&2
  exit 2
fi

# Followed: xpk's docs/usage/workloads.md and `xpk workload create --help` (1.16). The pod's shell reads --command, so
# every flag is quoted for it, and exec lets SIGTERM reach the program. The grace period is what saving may take.
command=(xpk workload create "--cluster=$CLUSTER" "--workload=$WORKLOAD" --max-restarts=10
  --termination-grace-period-seconds=120 "${options[@]}" "--command=exec python -m grab_jax.main$(printf ' %q' "$@")")
if $dry; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
