#!/usr/bin/env bash
# Compress WavLM end to end: data lists, teacher, both steps, report. Run again to resume.
#   scripts/run_dpwavlm.sh LIBRISPEECH_DIR [RECIPE] [FLAGS...]
# RECIPE: dpwavlm_base_plus (default), dpwavlm_large
# FLAGS go to both steps, e.g. --trainer.devices 2
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
two_step_recipe "scripts/run_dpwavlm.sh" dpwavlm_base_plus "$@"
