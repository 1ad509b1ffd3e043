"""How a step's tokens spread over the experts of its sparse layers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ExpertLoad:
    """The experts of one layer that a step's tokens chose, without a shared one, which all tokens pass through."""

    layer: int
    num_experts: int  # E
    num_pairs: int  # choices: k for each token
    num_touched: int  # experts that some token chose
    num_expected: float  # how many that would be on average if each token chose any k of them
    busiest: int  # choices of the expert that most tokens chose
    nbytes: int  # of the touched experts and of a shared one

    @property
    def busiest_share(self) -> float:
        """The busiest expert's share of all choices."""
        return self.busiest / self.num_pairs

    @property
    def least_share(self) -> float:
        """The same if the load is as even as it can be."""
        return -(-self.num_pairs // self.num_experts) / self.num_pairs

    def as_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "experts": self.num_experts,
            "choices": self.num_pairs,
            "touched": self.num_touched,
            "expected": self.num_expected,
            "busiest_share": self.busiest_share,
            "bytes": self.nbytes,
        }


def describe_loads(loads: Sequence[ExpertLoad]) -> list[str]:
    """What a reader wants to know of all sparse layers; nothing if there are none."""
    if not loads:
        return []
    touched = [load.num_touched for load in loads]
    busiest, megabytes = max(loads, key=lambda load: load.busiest_share), sum(load.nbytes for load in loads) / 1e6
    return [
        f"experts that the tokens chose, of {loads[0].num_experts} in each of {len(loads)} layers: {min(touched)} to "
        f"{max(touched)}, {statistics.fmean(touched):.1f} on average ({loads[0].num_expected:.1f} if choices were "
        f"even), {megabytes:,.1f} MB; the busiest expert has {busiest.busiest_share:.0%} of the choices in layer "
        f"{busiest.layer} (at least {busiest.least_share:.0%})"
    ]
