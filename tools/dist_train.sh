#!/usr/bin/env bash
# tools/dist_train.sh CONFIG PROCESSES [options of train.py]
# One process a GPU; without GPUs on the CPU. NNODES, NODE_RANK, MASTER_ADDR and PORT as torchrun has them.
set -euo pipefail
torchrun --nnodes="${NNODES:-1}" --node-rank="${NODE_RANK:-0}" --master-addr="${MASTER_ADDR:-127.0.0.1}" \
    --master-port="${PORT:-29500}" --nproc-per-node="$2" \
    "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
