#!/usr/bin/env bash
# Train any system of the family end to end: data lists, teacher, training, report. Run again to resume.
#   scripts/run_students.sh NAME LIBRISPEECH_DIR [FLAGS...]
# NAME: fithubert, fitw2v2, armhubert_960h, armhubert_s_{960h,100h}, armwavlm_s_{960h,100h}, maskhubert_960h,
#       starhubert, starhubert_{l,s,xs}, distilhubert, dphubert_{star,mask}, dpwavlm_star, or any other recipe of conf/
# FLAGS go to every stage, e.g. --trainer.devices 2
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in -h | --help) usage "scripts/run_students.sh"; exit 0 ;; esac
[ $# -ge 2 ] || { usage "scripts/run_students.sh" >&2; exit 2; }
name=$1
data=$(cd "$CALLER_DIR" && realpath -m -- "$2")
shift 2
[ -f "conf/$name.yaml" ] || die "conf/$name.yaml: no such recipe; there are $(cd conf && echo *.yaml)"
[ -d "$data" ] || die "$data: no such folder"
setup requirements.txt
prepare_recipe "$data" "conf/$name.yaml" "$@"
exp=$(setting exp_dir "conf/$name.yaml" "$@")
if [ "$(setting pruning.units "conf/$name.yaml" "$@")" = "[]" ]; then
    final=$exp/final.pth
    if [ ! -f "$final" ] || [ "$exp/ckpts/last.ckpt" -nt "$final" ]; then
        fit_batch "conf/$name.yaml" "$exp" "$@"
        stage python distill.py --config "conf/$name.yaml" "$@" "${BATCH[@]}"
    fi
else
    two_steps "conf/$name.yaml" "$exp" "$@"
    final=$exp/final/final.pth
fi
[ "$exp/report.html" -nt "$final" ] || python report.py "$exp"
echo "Done: $final, $exp/report.html"
