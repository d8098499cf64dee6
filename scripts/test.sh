#!/usr/bin/env bash
# Lint, types and all tests on the CPU.
#   scripts/test.sh [--quick] [PYTEST_ARGS...]
# With --quick, for daily work, without the tests that train in processes of their own or are slow for other reasons.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case "${1:-}" in -h | --help) usage scripts/test.sh; exit 0 ;; esac
CHOSEN=()
if [ "${1:-}" = --quick ]; then
    CHOSEN=(-m "not slow and not process")
    shift
fi
setup requirements/dev.txt
unset PYTHONDONTWRITEBYTECODE # hundreds of processes import the same files
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
codespell
# types are checked beside the tests, whose last file often runs alone
said=$(mktemp) code=0
mypy >"$said" 2>&1 &
types=$!
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${CHOSEN[@]}" "$@" || code=$?
wait "$types" || code=$?
cat "$said"
rm "$said"
exit "$code"
