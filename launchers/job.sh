# shellcheck shell=bash
# Sourced by the job scripts, in the folder that sbatch was called in: sets up the environment and the rendezvous.

set -euo pipefail
# The exit code of a training that was asked to stop: PREEMPTED in d2s/workers/preemption.py; a test compares them.
preempted=75
fail() { echo "error: $*" >&2; exit 2; }

[ -f launchers/task.py ] || fail "$PWD holds no launchers/task.py: call sbatch in the project's folder"
# set +u around code of others, here and below: modules and conda use unset variables.
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

# What srun starts in each task. Nothing here may swallow signals on their way to the rank: container runtimes
# replace themselves by python or forward signals.
python=(python3)
container=()
case ${D2S_ENV:-venv:.venv} in
  venv:*)
    venv=${D2S_ENV:-venv:.venv}; venv=${venv#venv:}
    [ -x "$venv/bin/python" ] || fail "D2S_ENV: no $venv/bin/python; run make setup, or set D2S_ENV in launchers/site.env"
    python=("$venv/bin/python") ;;
  conda:*)
    command -v conda >/dev/null || fail "D2S_ENV: conda is not on the path; load its module in launchers/site.env"
    # conda sources the activation scripts of packages.
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

# The address by which SLURM reaches the first node; its name may not resolve outside of SLURM.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1)
# A port for this job alone, and a new one after each requeue, since the kernel may still hold the old one.
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 20000))
export MASTER_ADDR=${MASTER_ADDR:-$first}
export MASTER_PORT=${D2S_PORT:-$MASTER_PORT}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# Otherwise, after sbatch --export=NONE, srun would not pass these variables to the ranks.
export SLURM_EXPORT_ENV=ALL

# Rank 0 creates this file to have the job requeued. In this folder, because containers see it too.
export D2S_REQUEUE=$PWD/.requeue-$SLURM_JOB_ID
rm -f "$D2S_REQUEUE"

# tasks COMMAND ARGUMENT...: starts one rank per task, each with its own log file; the first failure ends all.
# Since SLURM 22.05 srun does not inherit --cpus-per-task from sbatch.
tasks() {
  logs=${D2S_LOGS:-logs}/${SLURM_JOB_NAME}-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
  mkdir -p "$logs"
  echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start ${SLURM_RESTART_COUNT:-0}; output of rank N in $logs/rank-N.log"
  srun --kill-on-bad-exit=1 --unbuffered --open-mode=append --output="$logs/rank-%t.log" \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    "${container[@]}" "${extra[@]}" "${python[@]}" -m d2s.launchers.task "$@"
}

# ended CODE: requeues the job if rank 0 asked for it, else exits with CODE, after copying the ranks' last error
# messages to the job's own output. After scancel it is never reached, because scancel ends this shell, too.
ended() {
  if [ -e "$D2S_REQUEUE" ]; then
    rm -f "$D2S_REQUEUE"
    echo "requeueing job $SLURM_JOB_ID" >&2
    scontrol requeue "$SLURM_JOB_ID" ||
      echo "error: job $SLURM_JOB_ID was not requeued, its checkpoint is complete: submit it again, with --resume" >&2
    exit "$preempted"
  fi
  if [ "$1" -ne 0 ] && [ "$1" -ne "$preempted" ]; then
    if [ -n "${logs:-}" ]; then
      grep -hiE "error(:|$)" "$logs"/rank-*.log | tail -n 5 >&2 || true
    fi
    echo "ended with code $1${logs:+: see $logs}" >&2
  fi
  exit "$1"
}
