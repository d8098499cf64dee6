#!/usr/bin/env bash
# Compress WavLM, or another teacher of its family, end to end: lists, teacher, both steps, report. Run again to resume.
#   scripts/run_dpwavlm.sh AUDIO_DIR [RECIPE] [FLAGS...]
# AUDIO_DIR: LibriSpeech or any folder of speech; what is not 16 kHz mono is copied so, beside the lists.
# RECIPE: dpwavlm_base_plus, dpwavlm_large.
# Without one dpwavlm_base_plus follows the teacher (--teacher_id ID_OR_FOLDER), the audio and the machine.
# FLAGS go to both steps, e.g. --optim.max_steps 1000; --dry_run prints what would run, how large, how long.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
two_step_recipe "scripts/run_dpwavlm.sh" dpwavlm_base_plus "$@"
