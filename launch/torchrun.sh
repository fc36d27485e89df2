#!/bin/bash
# A recipe under torchrun, one process a GPU. On one machine:
#     GPUS=8 launch/torchrun.sh RECIPE [--key=value ...]
# On several the same line on each of them, at about the same time; any one of them keeps the rendezvous:
#     NODES=2 GPUS=8 RENDEZVOUS=host1:29400 launch/torchrun.sh RECIPE
# NODES=1:2 goes on with one machine where the other is lost, and with both when it is back. The code is 75 where the
# run was preempted, saved, and is to be started again; 143 where it was ended before it could save; 2 for a recipe that
# is none, and 3 for a run that is given up: these would fail again.
. launch/env.sh
NODES=${NODES:-${PET_NNODES:-1}} # PET_*: of Kubeflow
GPUS=${GPUS:-${PET_NPROC_PER_NODE:-1}}
RENDEZVOUS=${RENDEZVOUS:-${PET_MASTER_ADDR:-localhost}:${PET_MASTER_PORT:-0}}
. launch/run_dir.sh
. launch/watch.sh
# Restarts are counted there: torchrun counts those of weeks together. Each start of the ranks is a line.
torchrun --nnodes="$NODES" --nproc-per-node="$GPUS" --max-restarts=1000000 \
    --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" --rdzv-id="${RDZV_ID:-${run//\//-}}" \
    --rdzv-conf=last_call_timeout=10 \
    --no-python bash -c '[ "$LOCAL_RANK" -gt 0 ] || echo >> "$0"; exec mmfusion fit "$@"' "$notes/starts" \
    -c "$@" --run_dir="$run" --resume auto &
watch $!
