"""What pruning is held to: parameters, multiply-accumulates, or milliseconds on a machine that was measured."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from distillation.errors import UserError
from distillation.latency import LatencyTable
from wav2vec2 import Wav2Vec2Model
from wav2vec2.feature_extractor import SAMPLE_RATE
from wav2vec2.hardconcrete import Alive

# The utterances of the SUPERB challenge's profiling protocol, in samples: LibriSpeech test-clean sorted by length,
# every 82nd from the first on. 224.86 s in all; each runs alone, and the published figures are the sums.
SUPERB_SAMPLES = (
    20560, 34560, 38480, 42560, 45600, 48720, 52000, 55120, 59120, 62720, 66400, 71200, 75200, 78640, 82800, 87520,
    92720, 98560, 104400, 111120, 118480, 125040, 132720, 142640, 154000, 166720, 180880, 197920, 217920, 239280,
    268160, 326000,
)  # fmt: skip
MACS_SECONDS = 10  # of the utterance whose multiply-accumulates are counted where nothing else is said
BUDGET = "budget"  # entry of checkpoints
EXAMPLES = "23.6M (parameters), 500GMACs or 35ms"
NUMBER = r"(?:[0-9]{1,3}(?:[,_][0-9]{3})+|[0-9]+)(?:\.[0-9]+)?"
PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


class Cost(nn.Module):
    """What a model costs, as an expectation over its masks. Without parameters; on the device of the model.

    Attributes:
        name: in recipes.
        unit: for people.
        scale: how many make one unit.
        digits: of a value in this unit.
        kept: plain types that make the same cost again, for a checkpoint.
    """

    name: ClassVar[str]
    unit: str
    scale: ClassVar[float] = 1.0
    digits: ClassVar[str] = ",.4g"

    def __init__(self, **kept: Any) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, model: Wav2Vec2Model, alive: Alive | None = None) -> Tensor:
        """Float64 scalar, differentiable in every ``log_alpha``.

        Args:
            model: with or without masks.
            alive: probability of each unit of a mask; by default what the masks say.
        """
        raise NotImplementedError

    def text(self, value: float) -> str:
        """A value with its unit."""
        return f"{value / self.scale:{self.digits}} {self.unit}"


class Parameters(Cost):
    """Parameters of the model, masks and heads excluded."""

    name, unit, digits = "params", "parameters", ",.0f"

    def forward(self, model: Wav2Vec2Model, alive: Alive | None = None) -> Tensor:
        """Number of parameters."""
        return model.get_num_params(alive)


class MultiplyAccumulates(Cost):
    """MACs of utterances that run alone, summed.

    Args:
        samples: lengths of the utterances at 16 kHz.
    """

    name, scale = "macs", 1e9

    def __init__(self, samples: Sequence[int]) -> None:
        super().__init__(samples=list(samples))
        self.samples = tuple(samples)
        of = "SUPERB" if self.samples == SUPERB_SAMPLES else f"{sum(self.samples) / SAMPLE_RATE:g} s"
        self.unit = f"GMACs ({of})"

    def forward(self, model: Wav2Vec2Model, alive: Alive | None = None) -> Tensor:
        """Number of multiply-accumulates."""
        return model.get_num_macs(self.samples, alive)


class Milliseconds(Cost):
    """Time of one utterance on the machine of a latency table."""

    name, unit = "milliseconds", "ms"

    def __init__(self, table: LatencyTable) -> None:
        super().__init__(table=table.content)
        self.table = table

    def forward(self, model: Wav2Vec2Model, alive: Alive | None = None) -> Tensor:
        """Milliseconds."""
        return self.table(model, alive)


def cost_from_state(state: dict[str, Any], source: object) -> Cost:
    """From its name and what it keeps.

    Raises:
        UserError: naming ``source``; it is damaged.
    """
    kind = state.get("cost")
    if kind == Parameters.name:
        return Parameters()
    samples = state.get("samples")
    if (
        kind == MultiplyAccumulates.name
        and isinstance(samples, list)
        and samples
        and all(type(n) is int and n > 0 for n in samples)
    ):
        return MultiplyAccumulates(samples)
    if kind == Milliseconds.name:
        return Milliseconds(LatencyTable(state.get("table"), source))
    raise UserError(f"{source}: damaged, its budget cannot be read")


@dataclass(frozen=True)
class Budget:
    """A cost that a model is to be pruned to.

    Attributes:
        cost: what counts.
        before: of the teacher.
        target: most that is to stay.
        sparsity: share of ``before`` to remove.
    """

    cost: Cost
    before: float
    target: float
    sparsity: float

    @classmethod
    def of_share(cls, cost: Cost, before: float, sparsity: float) -> Budget:
        """That removes a share of what the teacher costs."""
        target = (1 - sparsity) * before
        return cls(cost, before, round(target) if isinstance(cost, Parameters) else target, sparsity)

    @classmethod
    def of_target(cls, cost: Cost, before: float, target: float) -> Budget:
        """That leaves an absolute cost."""
        return cls(cost, before, target, 1 - target / before)

    @classmethod
    def read(cls, state: Any, source: object) -> Budget:
        """What :meth:`state` gave.

        Raises:
            UserError: naming ``source``; it is damaged.
        """
        try:
            before, target, sparsity = (float(state[key]) for key in ("before", "target", "sparsity"))
            valid = 0 < target <= before < math.inf and sparsity < 1
        except (KeyError, TypeError, ValueError):
            valid = False
        if not valid:
            raise UserError(f"{source}: damaged, its budget cannot be read")
        return cls(cost_from_state(state, source), before, target, sparsity)

    def state(self) -> dict[str, Any]:
        """Plain types for a checkpoint."""
        numbers = {"before": self.before, "target": self.target, "sparsity": self.sparsity}
        return {"cost": self.cost.name, **self.cost.kept, **numbers}

    def sparsity_of(self, value: Any) -> Any:
        """Share of the teacher's cost that a model of cost ``value`` lacks: of a number, or of a float64 tensor."""
        return 1 - value / self.before


def parse_target(text: str, cost: str, name: str) -> float:
    """A budget as people write it, in the unit of its cost.

    Args:
        text: such as 23.6M, 500GMACs, 35ms.
        cost: name of what it is to be of.
        name: of the setting, for messages.

    Raises:
        UserError: no such number, or a unit that is missing or another cost's.
    """
    found = re.fullmatch(rf" *({NUMBER}) *([kMGT]?) *(params|parameters|MACs|ms|) *", text)
    number = float(re.sub("[,_]", "", found[1])) if found else 0.0
    if found is None or number <= 0 or (found[3] == "ms" and found[2]):
        raise UserError(f"{name} is {text!r}: write a number with its unit, such as {EXAMPLES}")
    of = {"params": "params", "parameters": "params", "MACs": "macs", "ms": "milliseconds", "": None}[found[3]]
    if of is None and (cost != Parameters.name or not found[2]):
        raise UserError(f"{name} is {text}, and its unit is missing: write {EXAMPLES}")
    if of not in (None, cost):
        raise UserError(f"{name} is {text}, and pruning.cost is {cost}: set --pruning.cost {of}, or write {EXAMPLES}")
    return number * PREFIXES[found[2]]
