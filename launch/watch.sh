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
