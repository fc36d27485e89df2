#!/bin/bash
# A recipe under torchrun, one process a GPU. On one machine:
#     GPUS=8 launch/torchrun.sh RECIPE [--key=value ...]
# On several the same line on each of them, at about the same time; any one of them keeps the rendezvous:
#     NODES=2 GPUS=8 RENDEZVOUS=host1:29400 launch/torchrun.sh RECIPE
# NODES=1:2 goes on with one machine where the other is lost, and with both when it is back. The code is 75 where the
# run was preempted, saved, and is to be started again; 143 where it was ended before it could save; 2 for a recipe that
# is none.
. launch/env.sh
NODES=${NODES:-${PET_NNODES:-1}} # PET_*: of Kubeflow
GPUS=${GPUS:-${PET_NPROC_PER_NODE:-1}}
RENDEZVOUS=${RENDEZVOUS:-${PET_MASTER_ADDR:-localhost}:${PET_MASTER_PORT:-0}}
recipe=${1:?give a recipe}
given=$(printf '%s\n' "$@" | sed -n 's/^--run_dir=//p; /^--run_dir$/{n;p}' | tail -n 1)
run=${given:-${RUN_DIR:-$(sed -ns 's/^run_dir: *//p' -- "$@" 2> /dev/null | tail -n 1 | tr -d \"\')}}
run=${run:-runs/$(basename "$recipe" .yaml)}
run=${run/#\~\//$HOME/}

notes=$(mktemp -d) || exit
trap 'rm -r "$notes"' EXIT
export MMFUSION_REFUSED=$notes/refused PYTHONUNBUFFERED=1
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
agent= code= preempted=
trap preempt TERM USR1

# Restarts are counted here: torchrun counts those of weeks together. Each start of the ranks is a line.
: > "$notes/starts"
torchrun --nnodes="$NODES" --nproc-per-node="$GPUS" --max-restarts=1000000 \
    --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" --rdzv-id="${RDZV_ID:-${run//\//-}}" \
    --rdzv-conf=last_call_timeout=10 \
    --no-python bash -c '[ "$LOCAL_RANK" -gt 0 ] || echo >> "$0"; exec mmfusion fit "$@"' "$notes/starts" \
    -c "$@" --run_dir="$run" --resume auto &
agent=$!
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
        end 1 "given up: $((begun - fruitful - 1)) starts in a row left no new checkpoint in $run"
    [ -n "$code" ] && [ $((SECONDS - ended)) -gt 45 ] && kill -KILL $(ranks) $agent
    sleep 1 &
    wait $!
done
wait $agent
agents=$?
[ $agents -eq 0 ] && grep -qs '"state": "preempted"' "$run/status.json" && exit 75
[ $agents -eq 0 ] && [ -n "$preempted" ] && ! grep -qs '"state": "finished"' "$run/status.json" && exit 143
exit ${code:-$agents}
