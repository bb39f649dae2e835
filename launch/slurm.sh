#!/usr/bin/env bash
# Submit one grab_jax run as a Slurm job on one host with all its GPUs.
#   launch/slurm.sh [--dry-run] --flagfile=experiments/grab_practical.flags --run_dir=runs/NAME [overrides]
# Environment: GRAB_SBATCH (more sbatch options, e.g. "--partition=gpu --gres=gpu:1 --time=12:00:00"), PYTHON.
# A requeued or resubmitted job resumes where the killed one stopped, so give --run_dir.
set -euo pipefail

if [[ "${1:-}" == "--help" || $# -eq 0 ]]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0"
  exit 0
fi

dry=false
if [[ "$1" == "--dry-run" ]]; then
  dry=true
  shift
fi
if [[ " $* " != *" --run_dir="* ]]; then
  echo "launch/slurm.sh: give --run_dir=FOLDER, so that a requeued job resumes there" >&2
  exit 2
fi

root="$(cd "$(dirname "$0")/.." && pwd)"
read -r -a options <<<"${GRAB_SBATCH:-}"
run="srun --ntasks=1 $(printf '%q ' "$root/launch/local.sh" "$@")"
# A minute before the time limit the step gets SIGTERM: grab_jax saves its state and exits with 130; then go on later.
# shellcheck disable=SC2016  # expanded when the job runs
again='code=$?; if [ $code -eq 130 ]; then scontrol requeue "$SLURM_JOB_ID"; fi; exit $code'
command=(sbatch --job-name=grab_jax --nodes=1 --ntasks=1 --requeue --open-mode=append --signal=TERM@60
  "${options[@]}" --wrap "$run || { $again; }")
if $dry; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
