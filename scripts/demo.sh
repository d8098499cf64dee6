#!/usr/bin/env bash
# Everything on a laptop in minutes: synthetic speech, a tiny HuBERT teacher, every stage on the CPU, a report.
#   scripts/demo.sh [OUT]      OUT is demo_out by default; run again to resume
#   NO_VENV=1 scripts/demo.sh  in the active environment
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case "${1:-}" in -h | --help) usage scripts/demo.sh; exit 0 ;; esac
out=$(cd "$CALLER_DIR" && realpath -m -- "${1:-demo_out}")
setup requirements.txt requirements/demo.txt
began=$SECONDS

stage python -m demo.corpus --out "$out/corpus" --train_utterances 40 --no-keywords
[ -f "$out/data/valid.tsv" ] || stage python prepare_data.py --data "$out/corpus/LibriSpeech" --out "$out/data"
[ -f "$out/teacher.pth" ] || stage python convert_hubert_from_hf.py --model demo/teacher --out "$out/teacher.pth"
two_steps conf/demo.yaml "$out/run" --teacher_ckpt "$out/teacher.pth" --data.tsv_dir "$out/data"
cp "$out/run/final/final.pth" "$out/final.pth"
stage python report.py "$out/run" --out "$out/report.html" --if_changed
echo "Done in $((SECONDS - began)) s: $out/final.pth, $out/report.html"
