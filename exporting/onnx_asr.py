"""A folder that the package onnx-asr loads: a recogniser as ONNX, its characters and settings.

It is of the package's type "wav2vec2-ctc", for CTC models that take the audio as it is. Releases up to 0.12 do not have
the type; ``wav2vec2_ctc.py`` in the folder brings it.

Shapes: B batch, N samples, T frames, V characters.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from distillation.errors import UserError
from exporting import folders, onnx
from exporting.packages import require_packages
from exporting.source import Exported, ExportOptions, Source
from exporting.verify import ExportedOutputs, make_batches, max_difference, require_agreement, run_exported
from wav2vec2 import Wav2Vec2Model
from wav2vec2.feature_extractor import SAMPLE_RATE, valid_frames
from wav2vec2.vocabulary import written

TYPE = Path(__file__).with_name("wav2vec2_ctc.py")
UNIT = SAMPLE_RATE // 100  # samples of the frames that the package counts a model's frames in
INPUTS = {"waveforms": "input_values", "lengths": "input_lengths"}
NEVER = -1e4  # log-probability; an infinite one would not pass for a number
README = """\
# {name}

Speech recognition with the package [onnx-asr](https://pypi.org/project/onnx-asr), from `{source}`: 16 kHz, {count}
characters.

```python
import sys

import onnx_asr

sys.path.append("{name}")
import wav2vec2_ctc  # gives onnx-asr up to 0.12 this type of model

model = onnx_asr.load_model("wav2vec2-ctc", "{name}"{quantization})
print(model.recognize("audio.wav"))
print(model.with_timestamps().recognize(["audio.wav", "other.wav"]))
```
"""


class RecogniserOutputs(ExportedOutputs):
    """A model with the output that the package's type has."""

    def __init__(self, model: Wav2Vec2Model) -> None:
        super().__init__(model, last=True)

    @property
    def names(self) -> list[str]:
        """Of the outputs; the package asks for the first."""
        return ["logprobs", "frames"]

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, ...]:
        """Waveforms [B, N], lengths [B] -> log-probabilities [B, T, V], frames [B].

        What is padded is blank, since the package counts frames by a formula of its own; some always is, so that audio
        too short for a frame passes too.
        """
        logits, frames = self.model(F.pad(waveforms, (0, self.model.feature_extractor.receptive_field)), lengths)
        assert frames is not None
        blank = torch.full_like(logits[:1, :1], NEVER)
        blank[..., 0] = 0.0
        valid = valid_frames(frames, logits.shape[1])
        return torch.where(valid[..., None], F.log_softmax(logits, -1), blank), frames


def export(source: Source, out: Path, options: ExportOptions) -> Exported:
    """Write the folder, with ``model.int8.onnx`` beside ``model.onnx`` where 8 bits are wanted, and try it.

    The package loads it in a fresh process: log-probabilities against PyTorch, and texts and times against those.

    Raises:
        UserError: not a fine-tuned model, a package is missing, or the result differs by more than
            ``verify.TOLERANCE`` (int8 may); nothing is left.
    """
    vocabulary = source.vocabulary
    if vocabulary is None:
        raise UserError(
            f"{source.path}: has no output layer, so it writes nothing; fine-tune with finetune_ctc.py, or convert "
            "a fine-tuned model with --ctc"
        )
    shift = source.model.feature_extractor.frame_shift
    if shift % UNIT:
        raise UserError(f"{source.path}: {shift} samples per frame; onnx-asr counts in multiples of {UNIT}")
    require_packages("onnx-asr", *onnx.PACKAGES, "onnx_asr")
    outputs = RecogniserOutputs(source.model)
    with folders.unfinished(out) as made:
        _write_texts(made, out.name, source.path.name, vocabulary, shift, options)
        model = onnx.convert(outputs)
        for value in model.graph.inputs:
            value.name = INPUTS[str(value.name)]
        onnx.save(model, made / "model.onnx")
        if options.quantize:
            onnx.quantize(model)
            onnx.save(model, made / f"model.{options.quantize}.onnx")
        difference = require_agreement(outputs, "onnx_asr", made)
        require_texts("onnx_asr", made, vocabulary, shift)
        if options.quantize:
            kind = f"onnx_asr_{options.quantize}"
            difference = max_difference(outputs, kind, made)[0]
            require_texts(kind, made, vocabulary, shift)
    return Exported(difference, "for onnx-asr, which needs wav2vec2_ctc.py of the folder up to its release 0.12")


def _write_texts(
    folder: Path, name: str, source: str, vocabulary: Sequence[str], shift: int, options: ExportOptions
) -> None:
    """All but the models: characters, settings, the type's code, and a page that says how to load it.

    Args:
        folder: where to.
        name: that it will have.
        source: name of the file that the model came from.
        vocabulary: as in :class:`~exporting.source.Source`.
        shift: samples per frame.
        options: of the export.
    """
    texts_of = [written(symbol) for symbol in vocabulary]
    tokens = ["<blk>", *("\u2581" if text.isspace() else text for text in texts_of[1:])]
    quantization = f', quantization="{options.quantize}"' if options.quantize else ""
    texts = {
        "config.json": json.dumps({"model_type": "wav2vec2-ctc", "subsampling_factor": shift // UNIT}) + "\n",
        "vocab.txt": "".join(f"{token} {i}\n" for i, token in enumerate(tokens)),
        "README.md": README.format(name=name, source=source, count=sum(map(bool, texts_of)), quantization=quantization),
        TYPE.name: TYPE.read_text(encoding="utf-8"),
    }
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")


def require_texts(kind: str, folder: Path, vocabulary: Sequence[str], shift: int) -> None:
    """Refuse texts or times that are not those of the package's own log-probabilities."""
    for result in run_exported(kind, folder, make_batches()[:3]):
        texts, times = [], []
        for row in torch.from_numpy(result["logprobs"]).argmax(-1):
            first = (row != 0) & (row != F.pad(row, (1, 0))[:-1])
            text = "".join(written(vocabulary[i]) for i in row[first].tolist())
            texts.append(" ".join(text.split()))
            times.append(first.nonzero()[:, 0] * shift / SAMPLE_RATE)
        if result["texts"].tolist() != texts:
            raise UserError(f"{folder}: onnx-asr writes {result['texts'].tolist()} instead of {texts}; not kept")
        if not torch.allclose(torch.from_numpy(result["times"]).float(), torch.cat(times)):
            raise UserError(f"{folder}: onnx-asr counts other times of characters than {shift} samples per frame")
