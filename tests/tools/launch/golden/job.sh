#!/bin/bash
source ~/mmfusion/bin/activate
export MMFUSION_CACHE=/shared/mmfusion
export RUN_DIR=/shared/runs/My_run
export NODES=2
export GPUS=8
export MAX_FAILURES=3
export RENDEZVOUS=host1:29400
set -- 'recipes/a b.yaml' -c more.yaml --trainer.max_steps=100 '--data.seed=1; rm -rf $HOME'
# Network and library settings of every process of a run. Sourced by the scripts beside it; `mmfusion launch` copies it
# into what it submits. Each line keeps a value that is set already.

# --- torch
# In torch 2.13 a rendezvous' store outlives a restart with the old address of rank 0 in it: restarts fail by chance.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
# Threads of each process, else each takes all cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-4}}
# Longer packs now and then would else leave holes in the GPU's memory.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# --- NCCL
# A rank that waits in vain ends with an error instead of waiting on; --timeout_minutes of mmfusion fit says how long.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# What it reports of its set-up: WARN, or INFO where a network is to be found out about.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Which interface carries the set-up and, without InfiniBand, the data, where a node has several networks:
# export NCCL_SOCKET_IFNAME=eth0
# InfiniBand adapters, where not all may be used: export NCCL_IB_HCA=mlx5_0,mlx5_1
# RoCE networks want the index of their global identifier: export NCCL_IB_GID_INDEX=3
# No InfiniBand although there are adapters: export NCCL_IB_DISABLE=1

# --- gloo, of CPU processes: one interface by name, where the host's name does not lead to the right one
# export GLOO_SOCKET_IFNAME=eth0

# --- Hugging Face: nothing is looked up in the midst of a run where all weights are in the cache
# export HF_HUB_OFFLINE=1
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
