#!/bin/bash
# A recipe under torchrun, one process a GPU. On one machine:
#     GPUS=8 launch/torchrun.sh RECIPE [--key=value ...]
# On several the same line on each of them, at about the same time; any of them may keep the rendezvous:
#     NODES=2 GPUS=8 RENDEZVOUS=host1:29400 launch/torchrun.sh RECIPE
# NODES=1:2 goes on with one machine where the other one is lost, and with both when it is back.
. launch/env.sh
recipe=${1:?give a recipe}
run=${RUN_DIR:-runs/$(basename "$recipe" .yaml)}
exec torchrun --nnodes="${NODES:-1}" --nproc-per-node="${GPUS:-1}" --max-restarts="${MAX_FAILURES:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="${RENDEZVOUS:-localhost:0}" --rdzv-id="${RDZV_ID:-$run}" \
    --rdzv-conf=last_call_timeout=10 \
    -m mmfusion fit -c "$@" --run_dir="$run" --resume auto
