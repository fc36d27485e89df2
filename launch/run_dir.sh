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
