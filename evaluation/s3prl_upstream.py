"""Run s3prl with our models as upstreams, without copying a file into it.

    python -m evaluation.s3prl_upstream s3prl.run_downstream -u dphubert -k final.pth -d speech_commands ...
    python -m evaluation.s3prl_upstream s3prl.main SuperbKS --build_upstream.name dphubert \
        --build_upstream.path_or_url final.pth ...

The first argument is the module to run, the others are its own. Needs requirements/s3prl.txt. The name of the upstream
says which states s3prl is given, whatever the model: see ``UPSTREAMS``.
"""

import functools
import importlib.util
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from distillation.errors import UserError, command
from distillation.objectives.heads import LayerHead
from wav2vec2 import CheckpointError, Wav2Vec2Model, prune
from wav2vec2.checkpoint import load_checkpoint


@dataclass(frozen=True)
class States:
    """Which states an upstream gives as ``hidden_states``."""

    first: Literal["features", "layer_input"] | None = "features"
    """Before the layers: the feature projection, or what layer 1 sees; None for nothing."""
    layers: Literal["layers", "heads"] = "layers"
    """The L layers, or these through the heads of training."""
    predictions: bool = False
    """After the layers, what the heads make of the last one for each layer of the teacher that was predicted."""
    final_norm: bool = False
    """Put the last layer of pre-norm (Large) models through the final norm."""


OURS, LAYERS, HEADS = States(), States(first=None), States(first=None, layers="heads")
UPSTREAMS = {
    # L + 1 states, as the released DPHuBERT and this toolkit: 13 of a model of 12 layers
    "dphubert": OURS, "dpwavlm": OURS, "compressed": OURS,
    # as the experts released with these students: 12, without the Transformer's input; of some their heads
    "fithubert": LAYERS, "starhubert": LAYERS, "maskhubert": HEADS, "armhubert": HEADS, "armwavlm": HEADS,
    # as s3prl's expert for DistilHuBERT: the projected features, 2 layers and 3 predictions
    "distiller": States(predictions=True),
    # as s3prl's own experts for HuBERT, wav2vec 2.0 and WavLM: reproduces its baselines with a converted teacher
    "teacher": States(first="layer_input", final_norm=True),
}  # fmt: skip


class UpstreamExpert(nn.Module):
    """A model of any kind behind s3prl's interface.

    Args:
        ckpt: model file, folder or hub id, as for ``load_model``.
        states: which to give.
        kwargs: what s3prl passes to upstreams; unused.

    Raises:
        UserError: no file is named, or it lacks the heads that are to be given.
    """

    def __init__(self, ckpt: str, states: States = OURS, **kwargs: Any) -> None:
        super().__init__()
        if not ckpt:
            raise UserError("-k (run_downstream) or --build_upstream.path_or_url (recipes): name the model file")
        checkpoint = load_checkpoint(ckpt)
        # the masked network is the pruned one, and a run that trains it must not draw masks
        self.model = prune(checkpoint.model)[0] if checkpoint.model.masks() else checkpoint.model
        self.model.eval()
        self.states = states
        self.heads = feature_heads(checkpoint.heads, self.model)
        self.predictions = prediction_heads(checkpoint.heads) if states.predictions else nn.ModuleList()
        if states.layers == "heads" and not len(self.heads):
            raise UserError(
                f"{ckpt}: holds no heads for all of its layers, whose outputs this upstream gives: use -u dphubert"
            )

    def get_downsample_rates(self, key: str) -> int:
        """Samples per frame."""
        return self.model.feature_extractor.frame_shift

    def forward(self, wavs: list[Tensor]) -> dict[str, Any]:
        """Waveforms [N] of unequal lengths -> ``hidden_states``, [B, T, D] each, and ``heads`` if the file holds them.

        After the last valid frame of a row comes that frame again: s3prl cuts rows at N / 320, which may be one more.
        ``heads`` are the projections to the teacher's width that training has left in the file, [B, T, E] each.
        """
        shortest = self.model.feature_extractor.receptive_field
        lengths = torch.tensor([max(len(wav), shortest) for wav in wavs], device=wavs[0].device)
        waveforms = pad_sequence([wav.float() for wav in wavs], batch_first=True)
        missing = int(lengths.max()) - waveforms.shape[1]
        waveforms = nn.functional.pad(waveforms, (0, max(0, missing)))
        output, frames = self.model.run(waveforms, lengths)
        assert frames is not None
        transformer, num_frames = self.model.encoder.transformer, output.features.shape[1]

        def filled(state: Tensor, valid: Tensor) -> Tensor:
            index = torch.arange(num_frames, device=valid.device)[None].minimum(valid[:, None] - 1)
            return state.gather(1, index[..., None].expand(-1, -1, state.shape[-1]))

        def held(state: Tensor) -> Tensor:
            return filled(transformer.hold(state, num_frames, frames), frames)

        # heads make as many frames as they were reduced from; what time reduction has lost is the frame before again
        covered = transformer.covered(frames)
        heads = [filled(head(x, num_frames), covered) for head, x in zip(self.heads, output.layers)]
        layers = heads if self.states.layers == "heads" else list(map(held, output.layers))
        if self.states.final_norm and transformer.layer_norm_first:
            layers[-1] = transformer.layer_norm(layers[-1])
        if self.states.first is not None:
            layers.insert(
                0, held(output.layer_input) if self.states.first == "layer_input" else filled(output.features, frames)
            )
        layers += [filled(head(output.layers[-1]), frames) for head in self.predictions]
        result: dict[str, Any] = {"hidden_states": layers, "last_hidden_state": layers[-1]}
        return result | {"heads": heads} if heads else result


def feature_heads(heads: dict[str, Tensor], model: Wav2Vec2Model) -> nn.ModuleList:
    """The stored heads of all layers, in their order, as ``hint`` and ``masking`` make them; none of other kinds."""
    found = _by_index(heads, "(?:linear|upsampler)")
    if found.keys() != set(range(model.num_layers)):
        return nn.ModuleList()
    made = []
    for _, state in sorted(found.items()):
        head = LayerHead(model.embed_dim, len(state["linear.bias"]), model.encoder.transformer.reduction)
        head.load_state_dict(state)
        made.append(head)
    return nn.ModuleList(made)


def prediction_heads(heads: dict[str, Tensor]) -> nn.ModuleList:
    """The stored heads of the objective ``prediction_layer`` with ``heads: two_linear``, in their order."""
    made = []
    for _, state in sorted(_by_index(heads, "[02]").items()):
        if state.keys() == {f"{part}.{kind}" for part in "02" for kind in ("weight", "bias")}:
            first, second = state["0.weight"], state["2.weight"]
            head = nn.Sequential(nn.Linear(*first.shape[::-1]), nn.GELU(), nn.Linear(*second.shape[::-1]))
            head.load_state_dict(state)
            made.append(head)
    return nn.ModuleList(made)


def _by_index(heads: dict[str, Tensor], part: str) -> dict[int, dict[str, Tensor]]:
    """The weights and biases of the parts of each head, by its index; those of the first objective that has any."""
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in heads.items():
        if match := re.fullmatch(rf"(.*\.)??(\d+)\.({part}\.(?:weight|bias))", name):
            found.setdefault(match[1] or "", {}).setdefault(int(match[2]), {})[match[3]] = tensor
    return next(iter(found.values()), {})


def register() -> None:
    """Make the names known to s3prl."""
    from s3prl import hub

    for name in UPSTREAMS:
        setattr(hub, name, functools.partial(entry, name))


def entry(name: str, ckpt: str | None = None, **kwargs: Any) -> UpstreamExpert:
    """What s3prl calls for ``-u NAME``; keyword arguments as s3prl passes them."""
    return UpstreamExpert(ckpt or "", UPSTREAMS[name], **kwargs)


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
