#!/usr/bin/env bash
# The ten tasks of SUPERB on one model, resumable, collected in one results.json.
#   S3PRL=CHECKOUT scripts/superb.sh MODEL DATA_ROOT [TASKS...] --out DIR [--device cuda]
#   tasks: PR ASR KS IC SF SID ER ASV SD QbE; --help says where the corpora are expected
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case "${1:-}" in -h | --help) ;; *) setup requirements.txt requirements/s3prl.txt ;; esac
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
cd "$CALLER_DIR"
stage python -m evaluation.superb "$@"
