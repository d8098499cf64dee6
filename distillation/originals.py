"""What a teacher would be, before anything large is fetched or read: of its files only the settings."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from distillation.errors import UserError
from wav2vec2.checkpoint import CheckpointError
from wav2vec2.config import check_config
from wav2vec2.feature_extractor import SAMPLE_RATE
from wav2vec2.importers import ImportedModel, import_huggingface, import_torchaudio, naming
from wav2vec2.importers.folder import Settings, check_folder, find_weights, locate_folder
from wav2vec2.importers.source import TORCHAUDIO
from wav2vec2.importers.vocabulary import Vocabulary, read_labels, read_vocabulary


def describe_original(model: str, ctc: bool = False) -> dict[str, Any]:
    """Flat config of a teacher before its conversion: of its files only the settings are fetched and read.

    Args:
        model: hub id or local folder of a transformers model, or torchaudio:NAME.
        ctc: with the output layer, as :func:`find_vocabulary` says.

    Returns:
        The arguments of :func:`wav2vec2.wav2vec2_model`; the waveform is normalised as the model was trained with.

    Raises:
        CheckpointError: no such model, one without weights in its local folder, or one that a conversion would refuse.
        UserError: no such bundle, or one for another sample rate.
    """
    if model.startswith(TORCHAUDIO):
        config = import_bundle(model, find_bundle(model), {}, None).config
    else:
        folder = locate_folder(model, weights=False)
        _, complete = read_settings(folder)
        if Path(model).is_dir():
            find_weights(folder)
        with naming(folder):
            config = import_huggingface(complete, {}).config
    if ctc:
        config["aux_num_out"] = len(find_vocabulary(model).symbols)
    try:
        check_config(dict(config), is_wavlm="encoder_remaining_heads" in config)
    except ValueError as error:
        raise CheckpointError(f"{model}: its config builds no model: {error}") from error
    return config


def find_vocabulary(model: str) -> Vocabulary:
    """What the output layer of a model fine-tuned with CTC has rows for: of its files only the settings are needed.

    Args:
        model: hub id or local folder of a transformers model, or torchaudio:NAME.

    Raises:
        CheckpointError: no such model, or no vocabulary that models here can have.
        UserError: no such bundle, or one that is not fine-tuned.
    """
    if model.startswith(TORCHAUDIO):
        bundle = find_bundle(model)
        if not hasattr(bundle, "get_labels"):
            raise UserError(f"{model} is not fine-tuned with CTC, so it has no output layer to keep: leave --ctc out")
        with naming(model):
            return read_labels(bundle.get_labels(), bundle._params["aux_num_out"])
    folder = locate_folder(model, weights=False, tokenizer=True)
    _, config = read_settings(folder)
    if config.get("add_adapter"):
        raise CheckpointError(
            f"{folder}: add_adapter is true in its config: an output layer on an adapter cannot be kept"
        )
    return read_vocabulary(folder, config)


def read_settings(folder: Path) -> tuple[Settings, dict[str, Any]]:
    """What the folder says, and its config with the defaults of transformers filled in.

    Raises:
        CheckpointError: it is not of this family, or not valid.
    """
    settings = check_folder(folder)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with naming(folder), refusing("its config.json is not valid"):
        return settings, transformers.AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()


def find_bundle(source: str) -> Any:
    """The bundle of torchaudio:NAME.

    Raises:
        UserError: there is none, or it is for another sample rate.
    """
    import torchaudio

    bundles = {key: value for key, value in vars(torchaudio.pipelines).items() if hasattr(value, "_normalize_waveform")}
    if (bundle := bundles.get(source.removeprefix(TORCHAUDIO))) is None:
        raise UserError(f"{source}: no such bundle in torchaudio.pipelines; valid: {', '.join(bundles)}")
    if bundle.sample_rate != SAMPLE_RATE:
        raise UserError(f"{source} wants audio at {bundle.sample_rate} Hz; only {SAMPLE_RATE} is supported")
    return bundle


def import_bundle(source: str, bundle: Any, state: dict[str, Tensor], normalize: bool | None) -> ImportedModel:
    """The model of a bundle and its tensors.

    Raises:
        CheckpointError: an architecture that models here have not.
    """
    normalize_waveform = bundle._normalize_waveform if normalize is None else normalize
    with naming(source):
        return import_torchaudio(bundle._params, state, normalize_waveform)


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever transformers raises over a file with strange values becomes one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise CheckpointError(f"{what}: {reason}") from error
