"""Write the trained teacher as a folder that transformers loads, with the log of its training."""

from __future__ import annotations

import json
import logging
import os
import platform
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import HubertModel, Wav2Vec2FeatureExtractor

logger = logging.getLogger(__name__)

_CARD = """# A tiny HuBERT for the demo and for mini-SUPERB

{parameters:,} parameters, {layers} layers, {width} wide; float16 on disk, float32 in memory. Load it with
`transformers.HubertModel.from_pretrained(folder)`. Input: 16 kHz mono, not normalised. It knows only the synthetic
voices and the {words} words of the corpus made by `python -m demo.corpus --out CORPUS`: a model to test compression
on, of no use for real speech.

Trained on {date} with {cores} CPU cores ({machine}, torch {torch}) by
`python -m demo.train_teacher --corpus CORPUS --work_dir WORK`. Accuracy per frame (%) of a linear probe on each layer,
held-out speakers and sentences, silence left out:

| layer | words ({words} classes) | phones ({phones} classes) |
|---|---|---|
{accuracies}

| stage | steps | minutes | last loss | clusters' information on phones |
|---|---|---|---|---|
{stages}

`training_log.json` holds the settings and the curves.
"""


def _card(log: dict) -> str:
    rows = zip(log["accuracy"]["words"], log["accuracy"]["phones"], strict=True)
    accuracies = "\n".join(f"| {layer} | {word:.1f} | {phone:.1f} |" for layer, (word, phone) in enumerate(rows))
    stages = []
    for name, stage in log["stages"].items():
        last, information = stage["curve"][-1], stage["phone_information"]
        shown = f"{information:.3f}" if information is not None else "labels, not clusters"
        stages.append(f"| {name} | {last['step']:,} | {last['seconds'] / 60:.1f} | {last['loss']:.3f} | {shown} |")
    return _CARD.format(**log["classes"], **log["model"], **log["run"], accuracies=accuracies, stages="\n".join(stages))


def save_teacher(model: HubertModel, out: Path, log: dict) -> dict:
    """Write ``out``/{config.json, model.safetensors, preprocessor_config.json, training_log.json, README.md}.

    Weights are float16. ``config.json`` says float32 all the same, so that ``from_pretrained`` converts them at once:
    half precision is for the size of the file, not for computing. Returns ``log`` with what is known here added.
    """
    log = {
        "model": {
            "parameters": model.num_parameters(),
            "layers": model.config.num_hidden_layers,
            "width": model.config.hidden_size,
        },
        "run": {
            "date": datetime.now(UTC).date().isoformat(),
            "cores": os.cpu_count(),
            "machine": f"{platform.system()} {platform.machine()}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        **log,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch)
        model.config.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config.update(architectures=["HubertModel"], dtype="float32")
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=False).save_pretrained(folder)
        (folder / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
        (folder / "README.md").write_text(_card(log))
        out.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.replace(out / path.name)
    logger.info("%s: teacher of %s parameters", out, f"{log['model']['parameters']:,}")
    return log
