#!/usr/bin/env bash
# Compress HuBERT, or another teacher of its family, end to end: lists, teacher, both steps, report. Run again to resume.
#   scripts/run_dphubert.sh AUDIO_DIR [RECIPE] [FLAGS...]
# AUDIO_DIR: LibriSpeech or any folder of speech; what is not 16 kHz mono is copied so, beside the lists.
# RECIPE: dphubert_base, dphubert_base_100h, dphubert_plus, dphubert_large, dphubert_xlarge,
# dphubert_base_{predlayer,nocnn,nostep2}.
# Without one dphubert_base follows the teacher (--teacher_id ID_OR_FOLDER), the audio and the machine.
# FLAGS go to both steps, e.g. --optim.max_steps 1000; --dry_run prints what would run, how large, how long.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
two_step_recipe "scripts/run_dphubert.sh" dphubert_base "$@"
