"""Stand-ins for Slurm's commands, each a small shell program: they set Slurm's variables and keep its exit codes.

`sbatch` runs the job at once, again where `scontrol requeue` asked for it; `srun` starts the tasks side by side and
returns the highest exit code; the job's output goes to `job.log`.
"""

SBATCH = r"""#!/usr/bin/env bash
nodes=1 each=1
for option in "$@"; do
  case "$option" in
    --nodes=*) nodes="${option#*=}" ;;
    --ntasks-per-node=*) each="${option#*=}" ;;
    --cpus-per-task=*) export SLURM_CPUS_PER_TASK="${option#*=}" ;;
  esac
done
printf '%s\n' "$@" >"$STANDIN/options"
cat >"$STANDIN/job.sh"
export SLURM_JOB_ID=7 SLURM_JOB_NUM_NODES=$nodes SLURM_NTASKS=$((nodes * each))
for start in 1 2 3; do
  rm -f "$STANDIN/requeue"
  code=0
  bash "$STANDIN/job.sh" >>"$STANDIN/job.log" 2>&1 || code=$?
  [ -e "$STANDIN/requeue" ] || break
done
echo "$code $start" >"$STANDIN/ended"
echo "Submitted batch job 7"
"""

SRUN = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$STANDIN/steps"
while [[ "$1" == --* ]]; do shift; done
export SLURM_STEP_NODELIST="n[1-$SLURM_JOB_NUM_NODES]" SLURM_STEP_NUM_NODES=$SLURM_JOB_NUM_NODES SLURM_LOCALID=0
tasks=() code=0
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i "$@" &
  tasks+=($!)
done
for task in "${tasks[@]}"; do
  wait "$task" || { ended=$?; if ((ended > code)); then code=$ended; fi; }
done
exit "$code"
"""

SCONTROL = '#!/usr/bin/env bash\necho "$*" >"$STANDIN/requeue"\n'


def install(folder):
    """Write the commands into a folder, and return what the environment must hold to find them."""
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"STANDIN": str(folder)}
