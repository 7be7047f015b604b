"""The policy table: each named way to choose entries is one row. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """Defaults for the axes of selection, with the source of the method."""

    score: str
    scope: str
    structure: str
    schedule: str
    paper: str


POLICIES: dict[str, Policy] = {
    "sift": Policy("gradient", "tensor", "entry", "first-batch", "Song et al. 2024, 2312.11875"),
    "random": Policy("random", "tensor", "entry", "first-batch", "SpRPA, 2502.15975"),
    "magnitude": Policy("magnitude", "tensor", "entry", "first-batch", "SHiRA, 2406.13175"),
}
