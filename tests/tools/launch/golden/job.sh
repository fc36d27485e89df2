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
# Of torchrun.sh and slurm.sbatch: where the run is, as --run_dir, $RUN_DIR or the last recipe with a run_dir says.
recipe=${1:?give a recipe}
run=$(printf '%s\n' "$@" | sed -n 's/^--run_dir=//p; /^--run_dir$/{n;p}' | tail -n 1)
run=${run:-$RUN_DIR}
run=${run:-$(sed -ns 's/^run_dir: *//p' -- "${@#--config=}" 2> /dev/null | tail -n 1 |
    sed -E "s/^\"([^\"]*)\".*/\1/; t; s/^'([^']*)'.*/\1/; t; s/(^|[[:space:]]+)#.*//; s/[[:space:]]+\$//; s/^(null|~)\$//")}
run=${run:-runs/$(basename "$recipe" .yaml)}
run=${run/#\~\//$HOME/}
MMFUSION_CACHE=${MMFUSION_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mmfusion}
while [[ $run =~ \$\{?([A-Za-z_][A-Za-z0-9_]*)\}? ]]; do
    name=${BASH_REMATCH[1]}
    run=${run/"${BASH_REMATCH[0]}"/"${!name:?run_dir is $run, but $name is not set}"}
done
# Of torchrun.sh: watches torchrun's agent and the ranks that it starts ($notes/starts: a line each time). It gives up
# after failures without a new checkpoint, hands on a signal to stop, and ends with the code of torchrun.sh.
notes=$(mktemp -d) || exit
trap 'rm -r "$notes"' EXIT
: > "$notes/starts"
export MMFUSION_REFUSED=$notes/refused PYTHONUNBUFFERED=1
agent= code= preempted=
trap preempt TERM USR1

ranks() { # that live: what an agent has not waited for yet is still there as a zombie
    for rank in $(cat /proc/$agent/task/*/children 2> /dev/null); do
        grep -sqE '^State:\s+[^Z]' "/proc/$rank/status" && echo "$rank"
    done
}
starts() { wc -l < "$notes/starts"; }
newest() { cat "$run/checkpoints/latest" 2> /dev/null; }
end() { # CODE MESSAGE: the agent, and ranks that have nothing to save
    [ -n "$code" ] && return
    code=$1 ended=$SECONDS
    echo "$2" >&2
    kill -TERM $agent
    kill -KILL $(ranks) 2> /dev/null
}
preempt() {
    agent=${agent:-$!}
    [ -n "$agent" ] || exit 143
    preempted=${preempted:-$(starts)}
    # Past the agent, which would give its ranks 30 seconds to save.
    kill -TERM $(ranks) 2> /dev/null || end 143 "stopped before there was anything to save"
}
watch() { # AGENT
    agent=$1
    fruitful=0 saved=$(newest)
    alone=0 # seconds without a rank: an agent waits for ever where the network to the rendezvous is cut
    while kill -0 $agent 2> /dev/null; do
        [ -n "$(ranks)" ] && alone=0 || alone=$((alone + 1))
        if [ $alone -ge "${ALONE_SECONDS:-900}" ]; then
            echo "$(uname -n): no rank of this run was here for $alone seconds (ALONE_SECONDS), for the machines of this" \
                "run have not met at $RENDEZVOUS; given up. The network between them is cut, or the others are gone: look" \
                "at what each said last. The same line on each goes on from the newest checkpoint in $run." >&2
            kill -KILL $agent
        fi
        begun=$(starts) # before a checkpoint is looked for: it may be the last start's
        [ "$(newest)" = "$saved" ] || saved=$(newest) fruitful=$begun
        [ -e "$notes/refused" ] && end 2 "the recipe was refused; it is not tried again"
        [ -n "$preempted" ] && [ "$begun" -gt "$preempted" ] && end 143 "stopped, and not saved"
        [ $((begun - fruitful)) -gt "${MAX_FAILURES:-3}" ] &&
            end 3 "given up: $((begun - fruitful - 1)) starts in a row left no new checkpoint in $run"
        [ -n "$code" ] && [ $((SECONDS - ended)) -gt 45 ] && kill -KILL $(ranks) $agent
        sleep 1 &
        wait $!
    done
    wait $agent
    agents=$?
    [ $agents -eq 0 ] && grep -qs '"state": "preempted"' "$run/status.json" && exit 75
    [ $agents -eq 0 ] && [ -n "$preempted" ] && ! grep -qs '"state": "finished"' "$run/status.json" && exit 143
    exit ${code:-$agents}
}
# Restarts are counted there: torchrun counts those of weeks together. Each start of the ranks is a line.
torchrun --nnodes="$NODES" --nproc-per-node="$GPUS" --max-restarts=1000000 \
    --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" --rdzv-id="${RDZV_ID:-${run//\//-}}" \
    --rdzv-conf=last_call_timeout=10 \
    --no-python bash -c '[ "$LOCAL_RANK" -gt 0 ] || echo >> "$0"; exec mmfusion fit "$@"' "$notes/starts" \
    -c "$@" --run_dir="$run" --resume auto &
watch $!
