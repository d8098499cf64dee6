#!/usr/bin/env bash
# Runs s3prl with a model of ours in an environment of its own.
#   scripts/test_s3prl.sh [PYTEST_ARGS...]
VENV=.venv-s3prl
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case "${1:-}" in -h | --help) usage scripts/test_s3prl.sh; exit 0 ;; esac
setup requirements.txt requirements/s3prl.txt
python -m pip install --quiet --disable-pip-version-check "pytest>=8.4"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1
python -m pytest tests/evaluation/test_s3prl_runs.py "$@"
