#!/usr/bin/env bash
# Run a sweep, or one run per flagfile, on several local processes, a Slurm cluster or a TPU slice.
#   launch/sweep.sh [--dry-run] [--processes=N] -- --run_dir=FOLDER --attack=span --sweep_seed=0,1,2,3
#   launch/sweep.sh [--dry-run] [--processes=N] a.flags b.flags -- --run_dir=FOLDER [overrides]
#   launch/sweep.sh [--dry-run] --via=slurm.sh [its options] [FILES] -- --run_dir=FOLDER [flags]
# Processes take the cells that no other one holds; flagfiles run one a process, in FOLDER/<name of the file>. Where
# there are GPUs (CUDA_VISIBLE_DEVICES), each of several local processes has one. --via names a script beside this one.
# Environment: that of launch/local.sh, or of the script named by --via.
set -euo pipefail

if [[ "${1:-}" == "--help" || $# -eq 0 ]]; then sed -n '2,8s/^# \{0,1\}//p' "$0" && exit 0; fi
here="$(cd "$(dirname "$0")" && pwd)"
files=() options=() via=local.sh processes=1 folder=""
while [[ $# -gt 0 && "$1" != "--" ]]; do
  case "$1" in
    --dry-run) options=("$1" "${options[@]}") ;; # first, where scripts expect it
    --processes=*) processes="${1#*=}" ;;
    --via=*) via="${1#*=}" ;;
    *.flags) files+=("$1") ;;
    *) options+=("$1") ;;
  esac && shift
done
for argument in "$@"; do if [[ "$argument" == --run_dir=?* ]]; then folder="${argument#*=}"; fi; done
if [[ -z "$folder" || ! "$processes" =~ ^[1-9][0-9]*$ || ! -x "$here/$via" ]]; then
  echo "launch/sweep.sh: expected [options] -- --run_dir=FOLDER [flags], with --processes a number and --via a script" \
    "beside this one; got --processes=$processes, --via=$via and ${folder:-no} folder" >&2
  exit 2
fi
shift
gpus=() code=0 pids=() slots=() stopped=false
if [[ "$via" != local.sh ]]; then options+=(--) processes=1; fi
if ((processes > 1)); then
  found="$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -x '[0-9]*' | paste -sd, || true)"
  IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES-$found}"
  if ((${#gpus[@]} > 0 && ${#gpus[@]} < processes)); then
    processes=${#gpus[@]} && echo "launch/sweep.sh: one process per GPU, so $processes at a time" >&2
  fi
fi
if [[ ${#files[@]} -gt 0 ]]; then count="${#files[@]}"; else count="$processes"; fi
# Stopped, every process saves its state. Each has a session of its own: Ctrl-C would reach it twice, "stop at once".
trap 'count=0 stopped=true; kill -TERM $(jobs -pr) 2>/dev/null || true' INT TERM HUP
for ((job = 0, slot = 0; job < count; job++)); do
  while ((job < count)) && [[ " $(jobs -pr | tr '\n' ' ')" == *" ${slots[slot]:-none} "* ]]; do
    slot=$(((slot + 1) % processes)) && sleep 0.1
  done
  if ((job >= count)); then break; fi # stopped while it waited
  own=("$@")
  if [[ ${#files[@]} -gt 0 ]]; then
    own=("--flagfile=${files[job]}" "$@" "--run_dir=$folder/$(basename "${files[job]}" .flags)")
  fi
  if [[ ${#gpus[@]} -gt 0 ]]; then export CUDA_VISIBLE_DEVICES="${gpus[slot]}"; fi
  setsid "$here/$via" "${options[@]}" "${own[@]}" &
  pids+=($!) slots[slot]=$!
done
for pid in "${pids[@]}"; do
  stopped=true
  while $stopped; do stopped=false ended=0 && { wait "$pid" || ended=$?; }; done # a signal ends the wait, not the child
  if ((ended > code)); then code=$ended; fi
done
exit "$code"
