"""Run s3prl with our models as upstreams, without copying a file into it.

    python -m evaluation.s3prl_upstream s3prl.run_downstream -u dphubert -k final.pth -d speech_commands ...
    python -m evaluation.s3prl_upstream s3prl.main SuperbKS --build_upstream.name dphubert \
        --build_upstream.path_or_url final.pth ...

The first argument is the module to run, the others are its own. Needs requirements/s3prl.txt.
"""

import importlib.util
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from distillation.errors import UserError, command
from wav2vec2 import CheckpointError, prune
from wav2vec2.checkpoint import load_checkpoint

NAMES = ("dphubert", "dpwavlm", "compressed")  # one expert serves all; the name shows in s3prl's logs


class UpstreamExpert(nn.Module):
    """A model of any kind behind s3prl's interface.

    Args:
        ckpt: model file, folder or hub id, as for ``load_model``.
        kwargs: what s3prl passes to upstreams; unused.
    """

    def __init__(self, ckpt: str, **kwargs: Any) -> None:
        super().__init__()
        if not ckpt:
            raise UserError("-k (run_downstream) or --build_upstream.path_or_url (recipes): name the model file")
        checkpoint = load_checkpoint(ckpt)
        # the masked network is the pruned one, and a run that trains it must not draw masks
        self.model = prune(checkpoint.model)[0] if checkpoint.model.masks() else checkpoint.model
        self.model.eval()
        self.heads = feature_heads(checkpoint.heads, self.model.embed_dim, self.model.num_layers)

    def get_downsample_rates(self, key: str) -> int:
        """Samples per frame."""
        return self.model.feature_extractor.frame_shift

    def forward(self, wavs: list[Tensor]) -> dict[str, Any]:
        """Waveforms [N] of unequal lengths -> ``hidden_states``: L + 1 tensors [B, T, D], and ``heads`` if there are.

        After the last valid frame of a row comes that frame again: s3prl cuts rows at N / 320, which may be one more.
        ``heads`` are the projections to the teacher's width that training has left in the file, for students whose
        published features they are (MaskHuBERT, ARMHuBERT): select them with ``-s heads``.
        """
        shortest = self.model.feature_extractor.receptive_field
        lengths = torch.tensor([max(len(wav), shortest) for wav in wavs], device=wavs[0].device)
        waveforms = pad_sequence([wav.float() for wav in wavs], batch_first=True)
        missing = int(lengths.max()) - waveforms.shape[1]
        waveforms = nn.functional.pad(waveforms, (0, max(0, missing)))
        states, frames = self.model.extract_features(waveforms, lengths)
        assert frames is not None
        index = torch.arange(states[0].shape[1], device=frames.device)[None].minimum(frames[:, None] - 1)
        states = [state.gather(1, index[..., None].expand(-1, -1, state.shape[-1])) for state in states]
        result: dict[str, Any] = {"hidden_states": states, "last_hidden_state": states[-1]}
        if len(self.heads):
            result["heads"] = [head(state) for head, state in zip(self.heads, states[1:], strict=True)]
        return result


def feature_heads(heads: dict[str, Tensor], width: int, num_layers: int) -> nn.ModuleList:
    """The stored heads if there is one linear map per layer, in their order; else none."""
    found = []
    for name in heads:
        weight, bias = heads[name], heads.get(name.removesuffix("weight") + "bias")
        if name.endswith("weight") and weight.dim() == 2 and weight.shape[1] == width and bias is not None:
            linear = nn.Linear(width, len(weight))
            linear.load_state_dict({"weight": weight, "bias": bias})
            found.append(linear)
    return nn.ModuleList(found if len(found) == num_layers else [])


def register() -> None:
    """Make the names known to s3prl."""
    from s3prl import hub

    for name in NAMES:
        setattr(hub, name, entry)


def entry(ckpt: str | None = None, **kwargs: Any) -> UpstreamExpert:
    """What s3prl calls for ``-u dphubert``; keyword arguments as s3prl passes them."""
    return UpstreamExpert(ckpt or "", **kwargs)


@command
def prepare(module: str) -> None:
    """Make s3prl importable and our models known to it."""
    from evaluation.s3prl_compat import install

    try:
        install()
        register()
    except ImportError as error:
        raise UserError(f"{error}: pip install -r requirements/s3prl.txt") from None
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{module}: no such module; s3prl.run_downstream and s3prl.main are what this is for")


def main() -> None:
    """Run a module of s3prl; its own errors keep their tracebacks."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(len(sys.argv) < 2 and 2)
    module = sys.argv[1]
    sys.path.insert(0, str(Path.cwd()))
    prepare(module)
    sys.argv = sys.argv[1:]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except (UserError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
