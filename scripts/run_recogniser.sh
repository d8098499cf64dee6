#!/usr/bin/env bash
# Compress a recogniser, with what is said in the loop: lists, teacher, both steps, report, error rates of both.
#   scripts/run_recogniser.sh AUDIO_WITH_TRANSCRIPTS [RECIPE] --teacher_id ID_OR_FOLDER [FLAGS...]
# AUDIO_WITH_TRANSCRIPTS: LibriSpeech, Common Voice, or a folder of audio with lists or Kaldi folders of what is said.
# RECIPE: dpctc_base. Without one it follows the teacher, a model of transformers fine-tuned with CTC, the audio and the
# machine. A recogniser of finetune_ctc.py: --teacher_ckpt E/final.pth instead of --teacher_id.
# FLAGS go to both steps, e.g. --optim.max_steps 1000; --dry_run prints what would run, how large, how long.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
two_step_recipe "scripts/run_recogniser.sh" dpctc_base "$@"
