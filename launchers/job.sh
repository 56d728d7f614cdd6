# shellcheck shell=bash
# What the job scripts share; sourced by them, from the folder that sbatch was called in.

set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }

[ -f launchers/task.py ] || fail "$PWD holds no launchers/task.py: call sbatch in the project's folder"
# What others have written need not mind unset variables: modules and conda do not.
if [ -f launchers/site.env ]; then
  set +u -a
  # shellcheck source=/dev/null
  source launchers/site.env
  set -u +a
fi

if [ -n "${D2S_MODULES:-}" ]; then
  read -ra modules <<<"$D2S_MODULES"
  set +u
  module load "${modules[@]}" || fail "D2S_MODULES: module load ${modules[*]} failed; see module avail"
  set -u
fi

# What srun starts in each task. A container's runtime replaces itself by python, or hands signals on: what
# must never stand between a signal and a rank is a launcher that handles it itself.
python=(python3)
container=()
case ${D2S_ENV:-venv:.venv} in
  venv:*)
    venv=${D2S_ENV:-venv:.venv}; venv=${venv#venv:}
    [ -x "$venv/bin/python" ] || fail "D2S_ENV: no $venv/bin/python; run make setup, or set D2S_ENV in launchers/site.env"
    python=("$venv/bin/python") ;;
  conda:*)
    command -v conda >/dev/null || fail "D2S_ENV: conda is not on the path; load its module in launchers/site.env"
    # Packages bring scripts of their own, which conda sources.
    set +eu
    eval "$(conda shell.bash hook)"
    conda activate "${D2S_ENV#conda:}" || fail "D2S_ENV: conda activate ${D2S_ENV#conda:} failed; see conda env list"
    set -eu
    python=(python) ;;
  apptainer:*)
    python=(apptainer exec --nv --bind "$PWD" --pwd "$PWD" "${D2S_ENV#apptainer:}" python3) ;;
  pyxis:*)
    container=(--container-image="${D2S_ENV#pyxis:}" --container-mounts="$PWD:$PWD" --container-workdir="$PWD") ;;
  none) ;;
  *) fail "D2S_ENV: ${D2S_ENV} is none of venv:DIR, conda:NAME, apptainer:IMAGE, pyxis:IMAGE, none" ;;
esac
extra=()
read -ra extra <<<"${D2S_SRUN_ARGS:-}"

# Nodes may have names that only SLURM can resolve: the address is the one it reaches the first node by.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1)
# A port of this job's own, another one after a requeue: the last one may linger in the kernel.
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 20000))
export MASTER_ADDR=${MASTER_ADDR:-$first}
export MASTER_PORT=${D2S_PORT:-$MASTER_PORT}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# After sbatch --export=NONE srun would keep all of this from the ranks.
export SLURM_EXPORT_ENV=ALL

# Rank 0 writes this file to have the job requeued. In this folder, which containers see too.
export D2S_REQUEUE=$PWD/.requeue-$SLURM_JOB_ID
rm -f "$D2S_REQUEUE"

# tasks COMMAND ARGUMENT...: one rank a task, its output in a file of its own, the first failure ends all.
# srun does not inherit --cpus-per-task from sbatch since SLURM 22.05.
tasks() {
  logs=${D2S_LOGS:-logs}/${SLURM_JOB_NAME}-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
  mkdir -p "$logs"
  echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start ${SLURM_RESTART_COUNT:-0}; output of rank N in $logs/rank-N.log"
  srun --kill-on-bad-exit=1 --unbuffered --open-mode=append --output="$logs/rank-%t.log" \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    "${container[@]}" "${extra[@]}" "${python[@]}" -m d2s.launchers.task "$@"
}

# ended CODE: puts the job back into the queue where rank 0 asked for it; else it ends with that code. A scancel
# ends this shell, too, before it comes here. A rank's last words belong where the user looks first.
ended() {
  if [ -e "$D2S_REQUEUE" ]; then
    rm -f "$D2S_REQUEUE"
    echo "requeueing job $SLURM_JOB_ID" >&2
    scontrol requeue "$SLURM_JOB_ID" ||
      echo "error: job $SLURM_JOB_ID was not requeued, its checkpoint is complete: submit it again, with --resume" >&2
    exit 75
  fi
  if [ "$1" -ne 0 ] && [ "$1" -ne 75 ]; then
    if [ -n "${logs:-}" ]; then
      grep -hiE "error(:|$)" "$logs"/rank-*.log | tail -n 5 >&2 || true
    fi
    echo "ended with code $1${logs:+: see $logs}" >&2
  fi
  exit "$1"
}
