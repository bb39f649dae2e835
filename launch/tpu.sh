#!/usr/bin/env bash
# Run grab_jax on every worker of a Cloud TPU slice: create it or use it again, copy the code, run, gather the results.
#   TPU_NAME=n ZONE=z launch/tpu.sh [--dry-run] [--queued] [gcloud options --] --run_dir=runs/NAME [flags]
#   TPU_NAME=n ZONE=z launch/tpu.sh --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot -- \
#     --run_dir=runs/a --attack=span --num_batches=64
# The options create the slice where there is none; --queued waits in the queue for it (with --runtime-version, not
# --version). Files that flags name by relative paths are copied along, an unfinished run folder too: the same command
# goes on where a lost slice stopped. A sweep needs a file system that every worker has mounted, and --run_dir=/FOLDER
# there; nothing is gathered then. The slice is not deleted. Environment: TPU_NAME and ZONE of the slice.
set -euo pipefail

if [[ "${1:-}" == "--help" || $# -eq 0 ]]; then sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 0; fi
cd "$(dirname "$0")/.."
dry=false folder="" options=() copied=(grab_jax launch experiments pyproject.toml README.md LICENSE)
create="tpu-vm create" until=true node="${TPU_NAME:-}" zone="--zone=${ZONE:-}" tpus="gcloud compute tpus"
words() { if (($#)); then printf ' %q' "$@"; fi; }
if [[ "$1" == "--dry-run" ]]; then dry=true && shift; fi
if [[ "${1:-}" == "--queued" ]]; then
  create="queued-resources create --node-id=$node" && shift
  until="until $tpus queued-resources describe $node $zone --format='value(state.state)' |
    grep -xE 'ACTIVE|FAILED|SUSPENDED'; do sleep 60; done"
fi
for ((i = 1; i <= $#; i++)); do
  if [[ "${!i}" == "--" ]]; then options=("${@:1:i-1}") && shift "$i" && break; fi
done
for value in "$@"; do
  if [[ "$value" == --run_dir=?* ]]; then folder="${value#*=}"; fi
  if [[ "${value#*=}" != [-/]* && -e "${value#*=}" ]]; then copied+=("${value#*=}"); fi
done
plain='^[a-z0-9-]+ --zone=[a-z0-9-]+ /?[A-Za-z0-9_][A-Za-z0-9._/-]*$'
if [[ ! "$node $zone $folder" =~ $plain || ("$folder" != /* && "$*" == *--sweep_*) ]]; then
  echo "launch/tpu.sh: set TPU_NAME, ZONE and give --run_dir as a path (for a sweep one with / in front, which all" \
    "workers share) of letters, digits and . _ / -; got TPU_NAME=$node $zone --run_dir=$folder" >&2
  exit 2
fi
# Followed: docs.cloud.google.com/tpu/docs/jax-pods, .../managing-tpus-tpu-vm and .../queued-resources.
# shellcheck disable=SC2088  # expanded on the workers, whose own Python may be too old: uv brings one
venv="~/.local/bin/uv venv -q --python 3.12 --allow-existing && ~/.local/bin/uv pip install -q -e '.[tpu]'"
# No results take the place of others: those of here get a name of their own there, those of a worker one here.
copy="mkdir -p grab_jax; cd grab_jax && tar --keep-newer-files --transform=s,/results[.],/results.sent., -xzf"
install="$copy ../grab_jax.tgz && python3 -m pip install -q --user uv && $venv"
gather="mkdir -p $folder
for worker in \$(seq 1 \$($tpus tpu-vm describe $node $zone --format='value(networkEndpoints.len())')); do
  own=\$fetched/\$worker
  $tpus tpu-vm scp $node:grab_jax/$folder \$own $zone --worker=\$((worker - 1)) --recurse || ((code)) || code=1
  for file in \$own/results.[!s]*; do mv \$file \${file/results./results.worker\$worker.} || :; done
  cp -R \$own/. $folder || :
done
launch/local.sh --mode=report --run_dir=$folder || ((code)) || code=1"
if [[ "$folder" == /* ]]; then gather=""; fi
program="cd$(words "$PWD")
$tpus tpu-vm describe $node $zone >/dev/null 2>&1 || { $tpus $create $node $zone$(words "${options[@]}") && $until; }
archive=\$(mktemp) fetched=\$(mktemp -d) code=0
tar --exclude=__pycache__ --exclude='results.sent.*' -czf \"\$archive\"$(words "${copied[@]}")
$tpus tpu-vm scp \"\$archive\" $node:grab_jax.tgz $zone --worker=all
$tpus tpu-vm ssh $node $zone --worker=all --command=\"$install\"
$tpus tpu-vm ssh $node $zone --worker=all$(words "--command=cd grab_jax && launch/local.sh$(words "$@")") || code=\$?
$gather
rm -r \"\$archive\" \$fetched; exit \$code"
if $dry; then echo "$program"; else exec bash -euo pipefail -c "$program"; fi
