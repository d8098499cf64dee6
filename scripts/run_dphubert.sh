#!/usr/bin/env bash
# Compress HuBERT end to end: data lists, teacher, both steps, report. Run again to resume.
#   scripts/run_dphubert.sh LIBRISPEECH_DIR [RECIPE] [FLAGS...]
# RECIPE: dphubert_base (default), dphubert_base_100h, dphubert_large, dphubert_xlarge, dphubert_base_{predlayer,nocnn,nostep2}
# FLAGS go to both steps, e.g. --trainer.devices 2
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
two_step_recipe "scripts/run_dphubert.sh" dphubert_base "$@"
