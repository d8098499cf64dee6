"""Import HuBERT and wav2vec 2.0 of fairseq, WavLM of unilm, UniSpeech and UniSpeech-SAT from what their files hold.

None of these packages is needed.
"""

import ast
from collections.abc import Mapping
from typing import Any

from wav2vec2.checkpoint import CheckpointError
from wav2vec2.feature_extractor import SAMPLE_RATE

from .mapping import (
    DATA2VEC_POSITIONS,
    MASK_EMBEDDING,
    ImportedModel,
    Rule,
    flat_config,
    heads_rule,
    import_tensors,
    require_architecture,
)
from .pickles import plain

# The released UniSpeech-SAT files call their class bc_m_hubert, the settings published beside them unispeech_sat.
PRETRAINED = ("wav2vec2", "hubert", "unispeech", "unispeech_sat", "bc_m_hubert")
FINE_TUNED = ("wav2vec_ctc", "wav2vec_seq2seq", "hubert_ctc", "hubert_seq2seq")
REFUSED = {  # architecture and reason
    "contentvec": "its last layers want to know the speaker; take its legacy file, which is a HuBERT",
    "data2vec_audio": DATA2VEC_POSITIONS,
    "data2vec_multi": DATA2VEC_POSITIONS,
}
EXTRACTOR_MODES = {"default": "group_norm", "layer_norm": "layer_norm"}
MAX_CONV_LAYERS = 64
_SETTINGS = {
    "embed_dim": "encoder_embed_dim", "num_layers": "encoder_layers", "num_heads": "encoder_attention_heads",
    "ff_interm_features": "encoder_ffn_embed_dim", "extractor_conv_bias": "conv_bias",
    "encoder_projection_dropout": "dropout_input", "encoder_pos_conv_kernel": "conv_pos",
    "encoder_pos_conv_groups": "conv_pos_groups", "encoder_attention_dropout": "attention_dropout",
    "encoder_ff_interm_dropout": "activation_dropout", "encoder_dropout": "dropout",
    "encoder_layer_norm_first": "layer_norm_first", "encoder_layer_drop": "encoder_layerdrop",
}  # fmt: skip

_TRANSFORMER = "encoder.transformer"
_LAYER = rf"{_TRANSFORMER}.layers.\1"
_RULES: list[Rule] = [
    (r"mask_emb", MASK_EMBEDDING),
    (r"(feature_extractor\.conv_layers\.\d+)\.0\.(weight|bias)", r"\1.conv.\2"),
    (r"(feature_extractor\.conv_layers\.0)\.2\.(weight|bias)", r"\1.layer_norm.\2"),
    (r"(feature_extractor\.conv_layers\.\d+)\.2\.1\.(weight|bias)", r"\1.layer_norm.\2"),
    (r"layer_norm\.(weight|bias)", r"encoder.feature_projection.layer_norm.\1"),
    (r"post_extract_proj\.(weight|bias)", r"encoder.feature_projection.projection.\1"),
    (r"encoder\.pos_conv\.0\.(weight_g|weight_v|bias)", rf"{_TRANSFORMER}.pos_conv_embed.conv.\1"),
    (r"encoder\.layer_norm\.(weight|bias)", rf"{_TRANSFORMER}.layer_norm.\1"),
    (r"encoder\.layer_norm_for_extract\.(weight|bias)", None),  # of UniSpeech-SAT's loss on speakers
    (r"encoder\.layers\.(\d+)\.self_attn\.([qkv]_proj|out_proj)\.(weight|bias)", rf"{_LAYER}.attention.\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(weight|bias)", rf"{_LAYER}.layer_norm.\2"),
    (r"encoder\.layers\.(\d+)\.fc1\.(weight|bias)", rf"{_LAYER}.feed_forward.intermediate_dense.\2"),
    (r"encoder\.layers\.(\d+)\.fc2\.(weight|bias)", rf"{_LAYER}.feed_forward.output_dense.\2"),
    (r"encoder\.layers\.(\d+)\.final_layer_norm\.(weight|bias)", rf"{_LAYER}.final_layer_norm.\2"),
    # unilm's WavLM
    (
        r"encoder\.layers\.(\d+)\.self_attn\.relative_attention_bias\.weight",
        rf"{_LAYER}.attention.rel_attn_embed.weight",
    ),
    (r"encoder\.layers\.(\d+)\.self_attn\.grep_linear\.(weight|bias)", rf"{_LAYER}.attention.gru_rel_pos_linear.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.grep_a", rf"{_LAYER}.attention.gru_rel_pos_const"),
    heads_rule("feature_extractor", "layer_norm", "post_extract_proj", "mask_emb", "encoder"),
]


def import_fairseq(checkpoint: Any, normalize_waveform: bool | None = None) -> ImportedModel:
    """Import a checkpoint of fairseq (``args`` or ``cfg`` layout), a fork of it, or unilm, pre-trained or fine-tuned.

    Args:
        checkpoint: what :func:`wav2vec2.importers.load_pickled` read from the ``.pt`` file.
        normalize_waveform: None for what the checkpoint's task says.

    Raises:
        CheckpointError: another kind of file or architecture, an option that changes the function (conformer layers,
            a deeper positional convolution), another sample rate, or a tensor of unknown name inside the backbone.
    """
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("model"), Mapping):
        raise CheckpointError("it has no 'model': not a checkpoint of fairseq or unilm")
    try:
        model, task = _settings(checkpoint)
    except RecursionError as error:
        raise CheckpointError("its settings refer to themselves") from error
    _refuse_options(model, task)
    flat = _flat_config(model, task, normalize_waveform)
    tensors, heads = _backbone(checkpoint["model"])
    return import_tensors(tensors, _RULES, flat, heads)


def _settings(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the pre-trained model and of its task, from any of the three layouts."""
    cfg, args = plain(checkpoint.get("cfg")), plain(checkpoint.get("args"))
    if isinstance(cfg, dict) and isinstance(cfg.get("model"), dict):
        model, task = cfg["model"], cfg.get("task") or {}
        name = model.get("_name") or model.get("arch")
    elif isinstance(args, dict):  # before hydra: one flat namespace
        model = task = args
        name = args.get("arch")
    elif isinstance(cfg, dict) and "encoder_layers" in cfg:  # unilm's WavLM: one flat dict without a name
        return cfg, cfg
    else:
        raise CheckpointError("it has neither 'cfg' nor 'args' that describe the model")
    if name in FINE_TUNED:
        inner = model.get("w2v_args")
        if not isinstance(inner, dict):
            raise CheckpointError(
                f"its fine-tuned model {name!r} does not hold the settings of the pre-trained one (w2v_args)"
            )
        pretrained, _ = _settings({"cfg": inner} if "model" in inner else {"args": inner})
        return pretrained, task
    require_architecture("architecture", name, (*PRETRAINED, *FINE_TUNED), REFUSED)
    return model, task


def _refuse_options(model: Mapping[str, Any], task: Mapping[str, Any]) -> None:
    rate = task.get("sample_rate") or SAMPLE_RATE
    if rate != SAMPLE_RATE:
        raise CheckpointError(f"it was trained on audio at {rate} Hz; only {SAMPLE_RATE} Hz is supported")
    only: dict[str, Any] = {
        "layer_type": "transformer",
        "structure_type": "transformer",
        "streaming": False,
        "expand_attention_head_size": -1,
        "pos_conv_depth": 1,
        "activation_fn": "gelu",
        "pos_enc_type": "abs",
        "conv_pos_batch_norm": False,
        "quantize_input": False,
        "adp_num": -1,
    }
    if model.get("relative_position_embedding"):
        only["gru_rel_pos"] = True
    for key, value in only.items():
        if model.get(key, value) not in (value, None):
            raise CheckpointError(f"{key}={model[key]!r} is not supported; only {value!r} is")


def _flat_config(model: Mapping[str, Any], task: Mapping[str, Any], normalize_waveform: bool | None) -> dict[str, Any]:
    def get(key: str) -> Any:
        if model.get(key) is None:
            raise CheckpointError(f"its settings have no {key!r}")
        return model[key]

    mode = get("extractor_mode")
    if mode not in EXTRACTOR_MODES:
        raise CheckpointError(f"extractor_mode {mode!r} is not supported; valid: {', '.join(EXTRACTOR_MODES)}")
    if normalize_waveform is None:
        given = task.get("normalize")
        normalize_waveform = mode == "layer_norm" if given is None else bool(given)
    buckets = (get("num_buckets"), get("max_distance")) if model.get("relative_position_embedding") else None
    return flat_config(
        conv_layers=_conv_layers(get("conv_feature_layers")),
        buckets=buckets,
        extractor_mode=EXTRACTOR_MODES[mode],
        normalize_waveform=normalize_waveform,
        **{ours: get(theirs) for ours, theirs in _SETTINGS.items()},
    )


def _backbone(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The backbone of a fine-tuned model, or UniSpeech, is in ``w2v_encoder.w2v_model``; the rest is its head."""
    tensors = {str(name): tensor for name, tensor in tensors.items()}
    for prefix in ("w2v_encoder.w2v_model.", "encoder.w2v_model."):
        if any(name.startswith(prefix) for name in tensors):
            backbone = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            return backbone, [name for name in tensors if not name.startswith(prefix)]
    return tensors, []


def _conv_layers(text: Any) -> list[tuple[int, int, int]]:
    """Read ``[(512, 10, 5)] + [(512, 3, 2)] * 4``, which fairseq evaluates as Python, without evaluating it."""
    error = CheckpointError(f"conv_feature_layers {text!r} is not a list of (channels, kernel, stride)")

    def read(node: ast.expr) -> list[Any]:
        match node:
            case ast.BinOp(left, ast.Add(), right):
                layers = read(left) + read(right)
            case ast.BinOp(left, ast.Mult(), ast.Constant(int(times))) if 0 <= times <= MAX_CONV_LAYERS:
                layers = read(left) * times
            case ast.List():
                layers = ast.literal_eval(node)
            case _:
                raise error
        if len(layers) > MAX_CONV_LAYERS:
            raise error
        return layers

    try:
        layers = read(ast.parse(str(text).strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError) as cause:
        raise error from cause
    if not layers or not all(
        isinstance(layer, tuple) and len(layer) == 3 and all(isinstance(n, int) and n > 0 for n in layer)
        for layer in layers
    ):
        raise error
    return layers
