#!/usr/bin/env bash
# Train on several processes of one or more machines, one per GPU (without GPUs: CPU processes).
set -euo pipefail

if (($# < 2)); then
    cat >&2 <<'USAGE'
Usage: dist_train.sh CONFIG GPUS [options of train.py]
GPUS is the number of processes on this machine. On several machines, run it on each, with in the
environment NNODES (machines, 1), NODE_RANK (0 to NNODES-1), MASTER_ADDR (of machine 0, 127.0.0.1)
and PORT (29500), in the same folder of a file system that they share.
USAGE
    exit 2
fi

exec torchrun \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$2" \
    "$(dirname "${BASH_SOURCE[0]}")/train.py" "$1" --launcher pytorch "${@:3}"
