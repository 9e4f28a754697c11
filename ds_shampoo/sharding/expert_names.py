"""Which of a layer's experts a parameter belongs to, as its name tells."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

# A module for each expert (`experts.3.up.weight`, `deepspeed_experts.3.`, `local_experts.3.`), or one for all of them
# with a weight and a bias for each (`experts.linear_fc1.weight3`). A fused `experts.weight1` is no expert's.
_EXPERT = re.compile(
    r"(?P<before>(?:.*\.)?[^.]*experts\.(?:linear_fc[12]\.(?:weight|bias))?)(?P<number>\d+)(?P<after>(?:\..*)?)"
)


class ExpertName(NamedTuple):
    """The name of an expert's parameter, taken apart.

    Attributes:
        before: what is the same for all experts of the layer, up to the number.
        number: the expert's.
        after: the rest, as "" or ".up.weight".
    """

    before: str
    number: int
    after: str

    def __str__(self) -> str:
        return f"{self.before}{self.number}{self.after}"

    def beside(self, model: nn.Module) -> int:
        """How many experts the model has at this place, this one among them; all that this rank has of a layer."""
        path, _, stem = self.before.rpartition(".")
        module = model.get_submodule(path)
        keys = {name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))}
        return sum(key.removeprefix(stem).isdecimal() for key in keys if key.startswith(stem))

    def numbered_from(self, first: int) -> ExpertName:
        """The name where `first` experts of other ranks come before this rank's."""
        return self._replace(number=first + self.number)


def expert_name(name: str) -> ExpertName | None:
    """A parameter's name as an expert's; None for one that does not tell which expert's."""
    found = _EXPERT.fullmatch(name)
    return ExpertName(found["before"], int(found["number"]), found["after"]) if found else None
