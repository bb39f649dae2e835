#!/usr/bin/env bash
# Run a sweep, or one run per flagfile, on several local processes, a Slurm cluster or a TPU slice.
#   launch/sweep.sh [--dry-run] [--processes=N] -- --run_dir=FOLDER --attack=span --sweep_seed=0,1,2,3
#   launch/sweep.sh [--dry-run] [--processes=N] a.flags b.flags -- --run_dir=FOLDER [overrides]
#   launch/sweep.sh [--dry-run] --via=slurm.sh [its options] [FILES] -- --run_dir=FOLDER [flags]
# Processes take the cells that no other one holds; flagfiles run one a process, in FOLDER/<name of the file>. On a host
# with GPUs each local process has one of its own. --via names a script beside this one.
# Environment: that of launch/local.sh, or of the script named by --via.
set -euo pipefail

if [[ "${1:-}" == "--help" || $# -eq 0 ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0"
  exit 0
fi

here="$(cd "$(dirname "$0")" && pwd)"
files=() options=() via=local.sh processes=1 folder=""
while [[ $# -gt 0 && "$1" != "--" ]]; do
  case "$1" in
    --dry-run) options=("$1" "${options[@]}") ;; # first, where scripts expect it
    --processes=*) processes="${1#*=}" ;;
    --via=*) via="${1#*=}" ;;
    *.flags) files+=("$1") ;;
    *) options+=("$1") ;;
  esac
  shift
done
for argument in "$@"; do
  if [[ "$argument" == --run_dir=?* ]]; then folder="${argument#*=}"; fi
done
if [[ -z "$folder" || ! "$processes" =~ ^[1-9][0-9]*$ || ! -x "$here/$via" ]]; then
  echo "launch/sweep.sh: expected [options] -- --run_dir=FOLDER [flags], with --processes a number and --via a script" \
    "beside this one; got --processes=$processes, --via=$via and ${folder:-no} folder" >&2
  exit 2
fi
shift

gpus=0 count="$processes" code=0 pids=()
if command -v nvidia-smi >/dev/null; then gpus="$(nvidia-smi --list-gpus | wc -l)"; fi
if [[ "$via" != local.sh ]]; then options+=(--) count=1 processes=1; fi
if [[ ${#files[@]} -gt 0 ]]; then count="${#files[@]}"; fi
# Stopped, every process saves its state; in the background they would not see Ctrl-C.
trap 'count=0 stopped=true; kill -TERM "${pids[@]}" 2>/dev/null' INT TERM
for ((job = 0; job < count; job++)); do
  while [[ "$(jobs -pr | wc -l)" -ge "$processes" ]]; do sleep 0.2; done
  own=("$@")
  if [[ ${#files[@]} -gt 0 ]]; then
    own=("--flagfile=${files[job]}" "$@" "--run_dir=$folder/$(basename "${files[job]}" .flags)")
  fi
  if ((gpus > 1 && processes > 1)); then export CUDA_VISIBLE_DEVICES=$((job % gpus)); fi
  "$here/$via" "${options[@]}" "${own[@]}" &
  pids+=($!)
done
for pid in "${pids[@]}"; do
  stopped=true
  while $stopped; do stopped=false ended=0 && { wait "$pid" || ended=$?; }; done # a signal ends the wait, not the child
  if ((ended > code)); then code=$ended; fi
done
exit "$code"
