"""Write the trained teacher as a folder that transformers loads, with the log of its training."""

import json
import logging
import os
import platform
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import jinja2
import torch
import transformers
from safetensors.torch import save_file
from transformers import HubertModel, Wav2Vec2FeatureExtractor

logger = logging.getLogger(__name__)

CARD = Path(__file__).with_name("teacher_card.md.jinja")


def _card(log: dict) -> str:
    return jinja2.Template(CARD.read_text(encoding="utf-8"), trim_blocks=True, keep_trailing_newline=True).render(log)


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
