#!/usr/bin/env bash
# What a GPU makes of this toolkit, in under 15 minutes: does everything run and give what the CPU gives (checks), what do
# the steps of the published recipe cost (speed), where does one of them go (profile).
#   scripts/gpu.sh OUT [checks] [speed] [profile] [FLAGS...]
# All three by default. OUT gets a .json and a .log of each; a part that is over its time ends, with what it has measured.
# The exit code is 1 if a part failed. FLAGS go to all; --device cpu --size small tries it without a GPU.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in -h | --help) usage "scripts/gpu.sh"; exit 0 ;; esac
[ $# -ge 1 ] || { usage "scripts/gpu.sh" >&2; exit 2; }
out=$1
shift
parts=()
while [ $# -ge 1 ] && [[ $1 != --* ]]; do
    case $1 in checks | speed | profile) parts+=("$1") ;; *) die "$1: choose checks, speed, profile" ;; esac
    shift
done
[ ${#parts[@]} -ge 1 ] || parts=(checks speed profile)
setup requirements.txt requirements/export.txt
mkdir -p "$out"
failed=0
for part in "${parts[@]}"; do
    case $part in
        checks) module=gpu_checks limit=270 ;;
        speed) module=gpu limit=420 ;;
        profile) module=gpu_profile limit=150 ;;
    esac
    echo "== $part"
    stage timeout --signal=INT --kill-after=20 "$limit" python -W ignore -m "benchmarks.$module" \
        --out "$out/$module.json" "$@" > >(tee "$out/$module.log") 2>&1 || failed=1
done
exit "$failed"
