"""Models of waveforms at 16 kHz for the package onnx-asr, whose releases up to 0.12 have no type for them.

    import onnx_asr
    import wav2vec2_ctc  # this file, which lies in the folder of the model
    model = onnx_asr.load_model("wav2vec2-ctc", FOLDER, quantization="int8")
    model.recognize("audio.wav")

A release that has the type loads the same folder without this file, which then changes nothing.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx_asr import loader

TYPE = "wav2vec2-ctc"


def _is_known() -> bool:
    try:
        loader.create_asr_resolver(TYPE, Path(__file__).parent)  # looks for no files yet
    except ValueError:
        return False
    return True


def _register() -> None:
    # names that a release with the type may not have any more
    from onnx_asr.asr import _AsrWithCtcDecoding
    from onnx_asr.resolver import Resolver
    from onnx_asr.utils import InvalidModelTypeInConfigError, ModelNotSupportedError

    class Wav2Vec2Ctc(_AsrWithCtcDecoding):
        """A CTC model that takes the audio as it is; its log-probabilities are blank where a row is padded."""

        # single spaces between words, whatever a word begins with; the package's own pattern drops those before signs
        DECODE_SPACE_PATTERN = re.compile(r"\A\s+|\s+\Z|(\s)\s*")

        def __init__(self, model_files: dict[str, Path], preprocessor_factory: Callable[[str], Any], onnx_options: Any):
            super().__init__(model_files, preprocessor_factory, onnx_options)
            self._model = onnxruntime.InferenceSession(model_files["model"], **onnx_options)

        @staticmethod
        def _get_model_files(quantization: str | None = None) -> dict[str, str]:
            """Patterns of the files' names."""
            return {"model": f"model{'?' + quantization if quantization else ''}.onnx", "vocab": "vocab.txt"}

        @property
        def _preprocessor_name(self) -> str:
            return "identity"

        @property
        def _subsampling_factor(self) -> int:
            """Frames of ``window_step`` in one of the model's."""
            return self.config["subsampling_factor"]

        def _encode(self, waveforms: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """Waveforms [B, N] and samples [B] -> log-probabilities [B, T, V] and frames [B]."""
            (log_probs,) = self._model.run(["logprobs"], {"input_values": waveforms, "input_lengths": lengths})
            return log_probs, np.full(len(waveforms), log_probs.shape[1])

    known = loader.create_asr_resolver

    def create_asr_resolver(model: str | None = None, local_dir: str | Path | None = None, **options: Any) -> Resolver:
        try:
            return known(model, local_dir, **options)
        except (ModelNotSupportedError, InvalidModelTypeInConfigError):
            return Resolver({TYPE: Wav2Vec2Ctc}, model, local_dir, **options)

    loader.create_asr_resolver = create_asr_resolver


if not _is_known():
    _register()
