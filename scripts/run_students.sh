#!/usr/bin/env bash
# Train any system of the family end to end: data lists, teacher, training, report. Run again to resume.
#   scripts/run_students.sh NAME LIBRISPEECH_DIR [FLAGS...]
# NAME: fithubert, fitw2v2, armhubert_960h, armhubert_s_{960h,100h}, armwavlm_s_{960h,100h}, maskhubert_960h,
#       starhubert, starhubert_{100h,l,s,xs}, distilhubert, dphubert_{star,mask}, dpwavlm_star, or any other of conf/
# FLAGS go to every stage, e.g. --trainer.devices 2
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in -h | --help) usage "scripts/run_students.sh"; exit 0 ;; esac
[ $# -ge 2 ] || { usage "scripts/run_students.sh" >&2; exit 2; }
whole_recipe "" "$2" "$1" "${@:3}"
