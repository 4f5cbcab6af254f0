#!/usr/bin/env bash
# Evaluate on a Slurm cluster.
set -euo pipefail

if (($# < 4)); then
    cat >&2 <<'USAGE'
Usage: slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]
Environment: GPUS (in total, 8), GPUS_PER_NODE (8), CPUS_PER_TASK (5), SRUN_ARGS (further options of
srun, divided at spaces).
USAGE
    exit 2
fi

read -r -a srun_args <<<"${SRUN_ARGS:-}"
exec srun -p "$1" \
    --job-name="$2" \
    --gres=gpu:"${GPUS_PER_NODE:-8}" \
    --ntasks="${GPUS:-8}" \
    --ntasks-per-node="${GPUS_PER_NODE:-8}" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${srun_args[@]+"${srun_args[@]}"} \
    python -u "$(dirname "${BASH_SOURCE[0]}")/test.py" "$3" "$4" --launcher slurm "${@:5}"
