"""The model card of an exported folder, filled from report.json where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wav2vec2 import Wav2Vec2Model
from wav2vec2.architecture import architecture
from wav2vec2.counting import count_params

HEADER = """---
library_name: transformers
pipeline_tag: {task}
tags:
- speech
- audio
- model-compression
---

# {name}

{parameters:,} parameters, {layers} Transformer layers of width {width}, 50 frames per second of 16 kHz audio.
Layers differ in size: heads {heads}; feed-forward units {units}; conv channels {channels}.
Made from `{source}`.
"""
USE = """
## Use

    import torch
    from transformers import AutoFeatureExtractor, AutoModel

    model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
    extractor = AutoFeatureExtractor.from_pretrained("{name}")
    inputs = extractor([waveform, another], sampling_rate=16000, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states  # index 0 is the Transformer's input

`attention_mask` matters: with it, a padded row gives what the row alone gives.
"""
USE_CTC = """
With its CTC head:

    from transformers import pipeline

    asr = pipeline("automatic-speech-recognition", model="{name}", trust_remote_code=True)
    asr(waveform)["text"]
"""


def model_card(model: Wav2Vec2Model, name: str, has_ctc_head: bool, source: Path, report: dict[str, Any] | None) -> str:
    """README.md of the folder.

    Args:
        model: dense.
        name: of the folder.
        has_ctc_head: show how to transcribe.
        source: file the model came from.
        report: content of report.json; what it has of sizes, cost and distances is shown.
    """
    found = architecture(model.config)
    text = HEADER.format(
        task="automatic-speech-recognition" if has_ctc_head else "feature-extraction",
        name=name,
        parameters=count_params(model),
        layers=model.num_layers,
        width=model.embed_dim,
        heads=", ".join(map(str, found.heads)),
        units=", ".join(map(str, found.interm)),
        channels=", ".join(map(str, found.conv)),
        source=source.name,
    )
    text += _results(report) if report else ""
    return text + USE.format(name=name) + (USE_CTC.format(name=name) if has_ctc_head else "")


def _results(report: dict[str, Any]) -> str:
    rows = ["| model | parameters | MACs for 10 s | real-time factor | held-out loss |", "|---|---|---|---|---|"]
    for entry in report.get("models", []):
        cost = entry.get("cost") or {}
        speed = [s for s in cost.get("speed", []) if s.get("device") == "cpu"]
        rows.append(
            f"| {entry['name']} | {cost.get('num_params', 0):,} | {cost.get('macs_10s', 0) / 1e9:.2f} G | "
            + (f"{speed[0]['real_time_factor']:.4f}" if speed else "")
            + f" | {_loss(entry)} |"
        )
    held_out = f"\nHeld out: {report['held_out_data']}.\n" if report.get("held_out_data") else ""
    return "\n## Results\n\n" + "\n".join(rows) + "\n" + held_out


def _loss(entry: dict[str, Any]) -> str:
    loss = (entry.get("held_out") or {}).get("loss")
    return "" if loss is None else f"{loss:.3f}"
