#!/usr/bin/env bash
# What a GPU makes of this toolkit, in under 15 minutes: does everything run and give what the CPU gives (checks), what do
# the steps of the published recipe cost (speed), where does one of them go (profile).
#   scripts/gpu.sh OUT [checks] [speed] [profile] [--device cpu] [--size small]
# All three by default. OUT gets a .json and a .log of each; a part that is over its time ends, and what it has measured
# stays. The exit code is 1 if a part failed. Without a GPU the two flags try it. NO_VENV=1 takes the active environment.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in -h | --help) usage "scripts/gpu.sh"; exit 0 ;; esac
[ $# -ge 1 ] || { usage "scripts/gpu.sh" >&2; exit 2; }
out=$1
shift
case $out in -* | checks | speed | profile) die "$out: name a folder for the results first" ;; esac
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
    exec 3> >(tee "$out/$module.log")
    log=$!
    stage timeout --signal=INT --kill-after=20 "$limit" python3 -W ignore -m "benchmarks.$module" \
        --out "$out/$module.json" "$@" >&3 2>&3 || failed=1
    exec 3>&-
    wait "$log"
done
exit "$failed"
