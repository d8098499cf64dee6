#!/usr/bin/env bash
# Compress wav2vec 2.0 end to end: data lists, teacher, both steps, report. Run again to resume.
#   scripts/run_dpwav2vec2.sh LIBRISPEECH_DIR [RECIPE] [FLAGS...]
# RECIPE: dpwav2vec2_base (default), dpxlsr_300m
# FLAGS go to both steps, e.g. --trainer.devices 2
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
two_step_recipe "scripts/run_dpwav2vec2.sh" dpwav2vec2_base "$@"
