"""A folder that transformers loads: weights, config, feature extractor, a model card, and the model's own code.

The code is left out where transformers' own class is wanted, which a model of equal layers may have.
"""

import json
import re
from pathlib import Path

from transformers import PreTrainedModel, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from exporting import folders
from exporting.card import model_card
from exporting.configuration_compressed_speech import CompressedSpeechConfig
from exporting.modeling_compressed_speech import CompressedSpeechForCTC, CompressedSpeechModel
from exporting.native import NativeOutputs, native_model, padding_changes, require_native
from exporting.source import Exported, ExportOptions, Source
from exporting.verify import ExportedOutputs, require_agreement
from wav2vec2 import Wav2Vec2Model
from wav2vec2.transformer import torch_spelling
from wav2vec2.vocabulary import SPACE, written

ROOT = Path(__file__).parent.parent
CODE = ("configuration_compressed_speech", "modeling_compressed_speech")
RELATIVE_IMPORT = r"^\s*from \.(\w+) import"


def export(source: Source, out: Path, options: ExportOptions) -> Exported:
    """Write the folder and run it in a fresh process against PyTorch.

    Args:
        source: with ``aux`` it becomes a model with a CTC head.
        out: folder to write; it does not exist or is empty.
        options: ``report`` fills the model card; with ``native`` it is transformers' own class, and where padding
            changes what that computes, it is run without.

    Raises:
        UserError: transformers has no class for the model, or the result differs by more than
            ``verify.TOLERANCE``; nothing is left.
    """
    model, native, vocabulary, report = source.model, options.native, source.vocabulary, source.report(options.report)
    if native:
        require_native(model, source.path)
    with folders.unfinished(out) as temporary:
        if native:
            whole, padded = native_model(model, len(vocabulary) if vocabulary else None), not padding_changes(model)
            words = f"{type(whole).__name__} of transformers" + ("" if padded else "; exact only without padding")
        else:
            whole, padded = _own_model(model, vocabulary), True
            words = "with its own code: trust_remote_code=True"
            for name, text in remote_code().items():
                (temporary / name).write_text(text, encoding="utf-8")
        _write(whole, temporary, vocabulary, normalize=native and bool(model.normalize_waveform))
        (temporary / "README.md").write_text(
            model_card(model, out.name, vocabulary is not None, source.path, report, native, padded), "utf-8"
        )
        outputs = NativeOutputs(model) if native else ExportedOutputs(model, last=False)
        kind = "transformers_native" if native else "transformers"
        return Exported(require_agreement(outputs, kind, temporary, padded), words)


def _own_model(model: Wav2Vec2Model, vocabulary: list[str] | None) -> PreTrainedModel:
    """The model in the class that the folder brings."""
    flat = {**model.config, "aux_num_out": None}
    module = CODE[1]
    config = CompressedSpeechConfig(
        model_config=flat,
        vocab_size=len(vocabulary) if vocabulary else 32,
        auto_map={
            "AutoConfig": f"{CODE[0]}.CompressedSpeechConfig",
            "AutoModel": f"{module}.CompressedSpeechModel",
            "AutoModelForCTC": f"{module}.CompressedSpeechForCTC",
            "AutoModelForAudioClassification": f"{module}.CompressedSpeechForSequenceClassification",
        },
        custom_pipelines={
            "feature-extraction": {"impl": f"{module}.AudioFeatureExtractionPipeline", "pt": ["AutoModel"]}
        },
    )
    backbone = {torch_spelling(name): t for name, t in model.state_dict().items() if not name.startswith("aux.")}
    base = CompressedSpeechModel(config)
    whole: CompressedSpeechModel | CompressedSpeechForCTC = base
    if vocabulary is not None:
        assert model.aux is not None
        whole = CompressedSpeechForCTC(config)
        whole.lm_head.load_state_dict(model.aux.state_dict())
        base = whole.compressed_speech
    base.backbone.load_state_dict(backbone)
    return whole


def _write(whole: PreTrainedModel, folder: Path, vocabulary: list[str] | None, normalize: bool) -> None:
    """Weights, config and what turns audio into inputs and outputs into text.

    Args:
        whole: the model.
        folder: where to.
        vocabulary: as in :class:`~exporting.source.Source`.
        normalize: normalise the waveform in the feature extractor; False where the model does it itself or not at all.
    """
    whole.save_pretrained(folder)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=True)
    extractor.save_pretrained(folder)
    if vocabulary is not None:
        # Transformers writes every symbol that it knows but the blank, and takes what it does not know for unk_token:
        # special symbols are left out, and pass for the blank.
        known = {symbol: row for row, symbol in enumerate(vocabulary) if row == 0 or written(symbol)}
        (folder / "vocab.json").write_text(json.dumps(known))
        tokenizer = Wav2Vec2CTCTokenizer(
            str(folder / "vocab.json"),
            bos_token=None,
            eos_token=None,
            unk_token=vocabulary[0],
            pad_token=vocabulary[0],
            word_delimiter_token=SPACE if SPACE in known else vocabulary[0],
        )
        Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)


def remote_code() -> dict[str, str]:
    """The files of code that make a folder work alone, by name: copied from the packages, imports made relative."""
    files: dict[str, str] = {}
    todo = [ROOT / "exporting" / f"{name}.py" for name in CODE]
    while todo:
        path = todo.pop()
        text = re.sub(r"^(from )(?:exporting|wav2vec2)\.", r"\1.", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        files[path.name] = text
        for name in re.findall(RELATIVE_IMPORT, text, flags=re.MULTILINE):
            found = [p for p in (path.with_name(f"{name}.py"), ROOT / "wav2vec2" / f"{name}.py") if p.is_file()]
            if f"{name}.py" not in files:
                todo.append(found[0])
    # transformers 4 takes from a folder, besides the file that it loads, only those that this one names
    entry = f"{CODE[-1]}.py"
    named = {entry, *(f"{name}.py" for name in re.findall(RELATIVE_IMPORT, files[entry], flags=re.MULTILINE))}
    files[entry] += "\n\nif False:  # transformers 4 copies what is named here\n"
    files[entry] += "".join(f"    from .{Path(name).stem} import __doc__\n" for name in sorted(files.keys() - named))
    return files
