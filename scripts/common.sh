# Sourced by the other scripts: the environment, and the chain of stages that all recipes share.
set -euo pipefail
CALLER_DIR=$PWD # audio and files to read are named relative to it; what is written, relative to the repository
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# die MESSAGE: one line, exit code 2.
die() {
    echo "error: $*" >&2
    exit 2
}

# usage SCRIPT: the lines of its header comment.
usage() { sed -n '2,/^[^#]/{s/^# //p}' "$1"; }

# setup REQUIREMENTS...: make and enter .venv (or $VENV) with these packages; NO_VENV=1 takes the active environment.
setup() {
    if [ "${NO_VENV:-0}" = 1 ]; then return; fi
    local python="" candidate
    for candidate in python3.12 python3.11 python3; do
        if "$candidate" -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || die "Python 3.11 or 3.12 with venv is needed and was not found"
    local venv=${VENV:-.venv}
    [ -f "$venv/bin/activate" ] || "$python" -m venv "$venv"
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
    local stamp
    stamp="$venv/installed-$(echo "$@" | cat - requirements.txt requirements/*.txt | cksum | cut -d" " -f1)"
    if [ ! -f "$stamp" ]; then
        echo "Installing $* into $venv (a few minutes, about 5 GB with the CUDA libraries)"
        local args=() file
        for file in "$@"; do args+=(-r "$file"); done
        python -m pip install --quiet --disable-pip-version-check "${args[@]}"
        touch "$stamp"
    fi
}

# stage COMMAND...: run it; a signal to this script (Ctrl-C, the time limit of a job) goes on to it, so that it saves and
# ends with code 75. In a process group of its own: Ctrl-C would otherwise reach it from the terminal as well.
stage() {
    local child code=0 signalled="" name
    set -m
    "$@" &
    child=$!
    set +m
    for name in INT TERM USR1 USR2; do
        # shellcheck disable=SC2064
        trap "signalled=$name; kill -$name $child 2>/dev/null || true" "$name"
    done
    # shellcheck disable=SC2064
    trap "signalled=TERM; kill -TERM $child 2>/dev/null || true" HUP # the terminal is gone
    wait "$child" || code=$?
    while [ -n "$signalled" ]; do # a signal ends the wait, not the child
        name=$signalled signalled="" code=0
        wait "$child" || code=$?
        if [ "$code" -gt 128 ] && [ -z "$signalled" ]; then # it had not come to listen yet
            echo "stopped: SIG$name: nothing was to be saved yet; run it again" >&2
            code=75
        fi
    done
    trap - INT TERM USR1 USR2 HUP
    return "$code"
}

# requeue CODE: end a SLURM job; one that was stopped by a signal goes back into the queue and resumes there.
requeue() {
    case $1 in 75 | 129 | 13? | 14?) scontrol requeue "$SLURM_JOB_ID" ;; esac
    exit "$1"
}

# fit_batch RECIPE EXP_DIR FLAGS...: sets BATCH. With FIT_BATCH=1 these flags cut the update into the largest
# micro-batches that the GPUs can train on, found once per recipe and machine.
fit_batch() {
    BATCH=()
    if [ "${FIT_BATCH:-0}" != 1 ]; then return; fi
    stage python fit_batch.py --config "$1" "${@:3}" --exp_dir "$2"
    BATCH=(--config "$2/batch.yaml")
}

# two_steps RECIPE EXP_DIR FLAGS...: distil and prune jointly, prune, distil again. Each stage looks what its folder holds
# and whether that is its own: what is finished is not repeated, what belongs to other settings is refused.
two_steps() {
    local recipe=$1 exp=$2
    shift 2
    fit_batch "$recipe" "$exp" "$@"
    set -- "$@" "${BATCH[@]}"
    stage python distill.py --config "$recipe" "$@" --exp_dir "$exp"
    stage python prune.py --distilled_ckpt "$exp/ckpts/last.ckpt" --out "$exp/pruned.pth"
    stage python final_distill.py --config "$recipe" "$@" --student_ckpt "$exp/pruned.pth" --exp_dir "$exp/final"
}

# from_caller FLAGS...: sets FLAGS, in which files to read that are named relative to the caller's folder are found from here.
from_caller() {
    local word flag="" value
    FLAGS=()
    for word in "$@"; do
        case $word in --teacher_id=* | --teacher_ckpt=* | --student_ckpt=* | --config=* | --pruning.latency=* | \
            --data.transcripts.*=*)
            flag=${word%%=*} value=${word#*=}
            [ ! -e "$CALLER_DIR/$value" ] || word=$flag=$(from_here "$value") ;;
        --data.noise.*=*) word=${word%%=*}=$(all_from_here "${word#*=}") ;;
        esac
        case $flag in --teacher_id | --teacher_ckpt | --student_ckpt | --config | --pruning.latency | --data.transcripts.*)
            [ ! -e "$CALLER_DIR/$word" ] || word=$(from_here "$word") ;;
        --data.noise.folders | --data.noise.impulse_responses) word=$(all_from_here "$word") ;;
        esac
        FLAGS+=("$word")
        flag=$word
    done
}

# from_here PATH: as it is where the caller is in the repository, else the absolute path.
from_here() { if [ "$CALLER_DIR" = "$PWD" ]; then echo "$1"; else realpath -- "$CALLER_DIR/$1"; fi; }

# all_from_here '[PATH,PATH]': the same with each path that is there as from_here gives it.
all_from_here() {
    local path found=()
    IFS=, read -r -a paths <<<"$(sed 's/^\[//; s/\]$//' <<<"$1")"
    for path in "${paths[@]}"; do
        path=${path# }
        if [ -e "$CALLER_DIR/$path" ]; then found+=("$(from_here "$path")"); else found+=("$path"); fi
    done
    if [[ $1 == \[* ]]; then (IFS=,; echo "[${found[*]}]"); else echo "${found[*]}"; fi
}

# answers_of COMMAND...: sets ANSWERS to the lines that it prints, the first of which is "plan"; else shows them and ends.
answers_of() {
    local file code=0
    file=$(mktemp)
    stage "$@" >"$file" || code=$?
    mapfile -t ANSWERS <"$file"
    rm "$file"
    [ "$code" = 0 ] || exit "$code"
    if [ "${ANSWERS[0]:-}" != plan ]; then # --help, --print_config
        printf "%s\n" "${ANSWERS[@]}"
        exit 0
    fi
}

# whole_recipe ADAPT AUDIO_DIR RECIPE [FLAGS...]: everything from audio to final.pth and a report. ADAPT is --adapt to have
# the recipe follow teacher, audio and machine, or empty. With --dry_run among the flags the plan is printed, no more.
whole_recipe() {
    local adapt=$1 audio recipe=conf/$3.yaml lists teacher teacher_id exp units head spoken copies case final
    audio=$(cd "$CALLER_DIR" && realpath -m -- "$2")
    [ -f "$recipe" ] || die "$recipe: no such recipe; there are $(cd conf && echo *.yaml)"
    shift 3
    from_caller "$@"
    setup requirements.txt
    set -- "$audio" ${adapt:+"$adapt"} --config "$recipe" "${FLAGS[@]}"
    case " $* " in *" --dry_run "*)
        stage python -m distillation.dry_run "$@"
        return ;;
    esac
    answers_of python -m distillation.plan "$@" # all that is wrong, at once
    lists=${ANSWERS[1]} teacher_id=${ANSWERS[2]} teacher=${ANSWERS[3]} exp=${ANSWERS[4]} units=${ANSWERS[5]}
    head=${ANSWERS[6]} spoken=${ANSWERS[7]} copies=${ANSWERS[8]} case=${ANSWERS[9]}
    set -- "${ANSWERS[@]:10}"
    if [ -n "$lists" ]; then
        stage python prepare_data.py --data "$audio" --out "$lists" --convert "$lists/audio" \
            ${adapt:+--skip_broken} ${spoken:+--transcripts "$audio"}
    fi
    [ -z "$teacher_id" ] || stage python convert_hubert_from_hf.py --model "$teacher_id" --out "$teacher" ${head:+"$head"}
    if [ "$units" = none ]; then
        final=$exp/final.pth
        fit_batch "$recipe" "$exp" "$@"
        stage python distill.py --config "$recipe" "$@" "${BATCH[@]}"
    else
        two_steps "$recipe" "$exp" "$@"
        final=$exp/final/final.pth
    fi
    stage python report.py "$exp" --if_changed
    [ -z "$spoken" ] || stage python -m evaluation.recognition "$teacher" "$final" --data "$spoken" --case "$case" \
        ${copies:+--audio "$copies"}
    echo "Done: $final, $exp/report.html"
}

# two_step_recipe SCRIPT DEFAULT_RECIPE AUDIO_DIR [RECIPE] [FLAGS...]
two_step_recipe() {
    local script=$1 default=$2
    shift 2
    case "${1:-}" in -h | --help) usage "$script"; exit 0 ;; "") usage "$script" >&2; exit 2 ;; esac
    [[ $1 != --* ]] || die "$1: the folder of audio comes first"
    if [ $# -gt 1 ] && [[ $2 != --* ]]; then
        whole_recipe "" "$@"
    else
        whole_recipe --adapt "$1" "$default" "${@:2}"
    fi
}
