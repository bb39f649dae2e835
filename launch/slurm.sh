#!/usr/bin/env bash
# Submit a run or a sweep to Slurm: one task per host, each with all devices of its host.
#   launch/slurm.sh [--dry-run] [sbatch options --] --run_dir=FOLDER --flagfile=FILE [overrides]
#   launch/slurm.sh --nodes=4 --gres=gpu:8 --time=12:00:00 -- --run_dir=runs/s --attack=span --sweep_seed=0,1,2,3
# All hosts must see the repository and the run folder. A job that nears its time limit saves its state and goes back
# into the queue; one that was killed goes on where it was when the same command is given again.
# Environment: PYTHON, GRAB_JAX_CACHE (see launch/local.sh), and sbatch's own, such as SBATCH_PARTITION.
set -euo pipefail

if [[ "${1:-}" == "--help" || $# -eq 0 ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0"
  exit 0
fi

dry=false options=() folder=""
if [[ "$1" == "--dry-run" ]]; then
  dry=true
  shift
fi
for ((i = 1; i <= $#; i++)); do
  if [[ "${!i}" == "--" ]]; then
    options=("${@:1:i-1}")
    shift "$i"
    break
  fi
done
for argument in "$@"; do
  if [[ "$argument" == --run_dir=?* ]]; then folder="$argument"; fi
done
if [[ -z "$folder" ]]; then
  echo "launch/slurm.sh: no --run_dir=FOLDER among the flags; give one, so that a requeued job resumes there" >&2
  exit 2
fi

root="$(cd "$(dirname "$0")/.." && pwd)"
# Tasks work on their own, so none ends the others. A minute before the time limit each gets SIGTERM: it saves its state
# and exits with 130. srun takes no --cpus-per-task from the job since Slurm 22.05. (slurm.schedmd.com: sbatch, srun)
job="#!/usr/bin/env bash
code=0
srun --kill-on-bad-exit=0 --wait=0 \${SLURM_CPUS_PER_TASK:+--cpus-per-task=\$SLURM_CPUS_PER_TASK} \\
  $(printf '%q ' "$root/launch/local.sh" "$@") || code=\$?
if [ \$code -eq 130 ]; then scontrol requeue \"\$SLURM_JOB_ID\"; fi
exit \$code"
command=(sbatch --job-name=grab_jax --nodes=1 --ntasks-per-node=1 --requeue --open-mode=append --signal=TERM@60
  "${options[@]}")
if $dry; then
  printf '%q ' "${command[@]}"
  printf '<<"JOB"\n%s\nJOB\n' "$job"
  exit 0
fi
exec "${command[@]}" <<<"$job"
