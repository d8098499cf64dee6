#!/usr/bin/env bash
# Lint, types and all tests on the CPU.
#   scripts/test.sh [PYTEST_ARGS...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case "${1:-}" in -h | --help) usage scripts/test.sh; exit 0 ;; esac
setup requirements/dev.txt
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
mypy
codespell
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
