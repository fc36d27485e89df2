#!/bin/bash
# A recipe under torchrun, one process a GPU. On one machine:
#     GPUS=8 launch/torchrun.sh RECIPE [--key=value ...]
# On several the same line on each of them, at about the same time; any one of them keeps the rendezvous:
#     NODES=2 GPUS=8 RENDEZVOUS=host1:29400 launch/torchrun.sh RECIPE
# NODES=1:2 goes on with one machine where the other is lost, and with both when it is back. The code is 75 where the
# run was preempted, saved, and is to be started again.
. launch/env.sh
NODES=${NODES:-${PET_NNODES:-1}} # PET_*: of Kubeflow
GPUS=${GPUS:-${PET_NPROC_PER_NODE:-1}}
RENDEZVOUS=${RENDEZVOUS:-${PET_MASTER_ADDR:-localhost}:${PET_MASTER_PORT:-0}}
recipe=${1:?give a recipe}
run=${RUN_DIR:-$(sed -ns 's/^run_dir: *//p' -- "$@" 2> /dev/null | tail -n 1 | tr -d \"\')}
run=${run:-runs/$(basename "$recipe" .yaml)}
torchrun --nnodes="$NODES" --nproc-per-node="$GPUS" --max-restarts="${MAX_FAILURES:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" --rdzv-id="${RDZV_ID:-${run//\//-}}" \
    --rdzv-conf=last_call_timeout=10 \
    -m mmfusion fit -c "$@" --run_dir="$run" --resume auto &
agent=$!
ranks() { # that live: what an agent has not waited for yet is still there as a zombie
    for rank in $(cat /proc/$agent/task/*/children 2> /dev/null); do
        grep -sqE '^State:\s+[^Z]' "/proc/$rank/status" && echo "$rank"
    done
}
# Past the agent, which would give its ranks 30 seconds to save.
trap 'kill -TERM $(ranks)' TERM USR1
alone=0 # seconds without a rank: an agent waits for ever where the network to the rendezvous is cut
while kill -0 $agent 2> /dev/null; do
    [ -n "$(ranks)" ] && alone=0 || alone=$((alone + 1))
    if [ $alone -ge "${ALONE_SECONDS:-900}" ]; then
        echo "the machines of this run have not met for $alone seconds ($RENDEZVOUS); given up." >&2
        kill -KILL $agent
    fi
    sleep 1 &
    wait $!
done
wait $agent
code=$?
[ $code -eq 0 ] && grep -q '"state": "preempted"' "$run/status.json" && exit 75
exit $code
