#!/usr/bin/env bash
# One recipe with several values of a setting: a run for each, then one page that compares them. Run again to resume.
#   scripts/sweep.sh AUDIO_DIR RECIPE --FLAG '[V1,V2,...]' [FLAGS...]
# e.g. --pruning.target_sparsity '[0.3,0.5,0.75,0.9]'; several flags with lists give all combinations. All runs share lists
# and teacher; their folders and compare.html are in the recipe's exp_dir (--exp_dir E for another).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in -h | --help) usage "scripts/sweep.sh"; exit 0 ;; esac
[ $# -ge 4 ] || { usage "scripts/sweep.sh" >&2; exit 2; }
audio=$1 recipe=$2
shift 2
[ -f "conf/$recipe.yaml" ] || die "conf/$recipe.yaml: no such recipe; there are $(cd conf && echo *.yaml)"
setup requirements.txt
answers_of python -m distillation.sweep --config "conf/$recipe.yaml" "$@"
runs=()
while IFS=$'\x1f' read -r -a words; do
    echo "== ${words[0]}"
    whole_recipe "" "$audio" "$recipe" "${words[@]:3}" </dev/null # without --config
    runs+=("${words[0]}")
done < <(printf "%s\n" "${ANSWERS[@]:1}")
stage python report.py "${runs[@]}" --out "$(dirname "${runs[0]}")/compare.html" --if_changed
