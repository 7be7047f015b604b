"""The policy table: each named way to choose entries is one row. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

SCORES = (
    "gradient",
    "absolute-gradient",
    "fisher",
    "snip",
    "magnitude",
    "smallest-magnitude",
    "random",
    "low-rank",
    "activation-magnitude",
    "large-gradient-small-weight",
    "gradient-per-input",
    "balanced-gradient",
    "centred-gradient",
    "agreement",
    "agreed-gradient",
    "sign-descent",
    "change",
)
SCOPES = ("tensor", "neuron", "global")
STRUCTURES = ("entry", "block", "row", "column")
SCHEDULES = ("first-batch", "every-batch", "every-n-steps", "after-warmup")
COMPARING = ("agreement", "sign-descent")  # scores that one batch alone leaves without an order
CHANGING = ("every-batch", "every-n-steps")  # schedules under which the support changes


@dataclass(frozen=True)
class Policy:
    """The four axes of selection, the source of the method, and other keys' defaults.

    `defaults` are of further keys of the selection, `train` of keys of the section train. `pace` is
    the learning rate that it bears, beside that of the others: large gradients read loud inputs,
    so that a step on them moves the model further (docs/how-selection-works.md).
    """

    score: str
    scope: str
    structure: str
    schedule: str
    paper: str
    defaults: Mapping[str, object] = field(default_factory=dict)
    train: Mapping[str, object] = field(default_factory=dict)
    pace: float = 1.0

    @property
    def more(self) -> dict[str, object]:
        """What it says beside its axes, as a recipe's keys and the usual rate's multiple."""
        rate = {} if self.pace == 1 else {"usual rate x": self.pace}
        train = {f"train.{key}": value for key, value in self.train.items()}
        return {**self.defaults, **train, **rate}


POLICIES: dict[str, Policy] = {
    "sift": Policy(
        "gradient",
        "tensor",
        "entry",
        "first-batch",
        "SIFT: Song et al. 2024, arXiv 2312.11875",
        pace=0.25,
    ),
    "current-batch": Policy(
        "gradient",
        "tensor",
        "entry",
        "every-batch",
        "compared in SIFT, arXiv 2312.11875",
        pace=0.25,
    ),
    "random": Policy("random", "tensor", "entry", "first-batch", "SpRPA, arXiv 2502.15975"),
    "magnitude": Policy("magnitude", "tensor", "entry", "first-batch", "SHiRA, arXiv 2406.13175"),
    "smallest-magnitude": Policy(
        "smallest-magnitude", "tensor", "entry", "first-batch", "PaFi: Liao et al., ACL 2023"
    ),
    "neuron-magnitude": Policy(
        "magnitude", "neuron", "entry", "first-batch", "NeuroAda, EMNLP 2025"
    ),
    "neuron-gradient": Policy(
        "gradient", "neuron", "entry", "first-batch", "GPS, CVPR 2024", pace=0.25
    ),
    "snip": Policy(
        "snip", "tensor", "entry", "first-batch", "SHiRA-SNIP, arXiv 2406.13175", pace=0.5
    ),
    "fisher": Policy(
        "fisher",
        "global",
        "entry",
        "first-batch",
        "FISH Mask, arXiv 2111.09839",
        {"batches": 8},
        pace=0.25,
    ),
    "low-rank": Policy(
        "low-rank", "tensor", "entry", "every-n-steps", "LIFT, ICML 2025", {"every": 50}
    ),
    "blocks": Policy(
        "absolute-gradient", "tensor", "block", "first-batch", "SMT, ICLR 2025", {"batches": 8}
    ),
    "columns": Policy("random", "tensor", "column", "first-batch", "PaCA, ICLR 2025"),
    "rows": Policy("random", "tensor", "row", "first-batch", "S2FT, NeurIPS 2024"),
    "drop-grow": Policy(
        "absolute-gradient",
        "tensor",
        "entry",
        "every-n-steps",
        "SpIEL, arXiv 2401.16405",
        {"drop": 0.2, "revert": True},
    ),
    "lottery": Policy(
        "change",
        "global",
        "entry",
        "after-warmup",
        "LT-SFT, ACL 2022",
        {"warmup_steps": 200, "warmup_trains": "all"},
    ),
    "large-gradient-small-weight": Policy(
        "large-gradient-small-weight",
        "tensor",
        "entry",
        "first-batch",
        "GaLLoP, arXiv 2510.19778",
    ),
    "activation-magnitude": Policy(
        "activation-magnitude", "tensor", "entry", "first-batch", "Wanda, arXiv 2306.11695"
    ),
    "scaled-sift": Policy(
        "gradient-per-input",
        "tensor",
        "entry",
        "first-batch",
        "SIFT's rule in scaled coordinates, docs/how-selection-works.md, 2026",
        train={"step_scale": "input", "head_start": "auto"},
    ),
    "gradient-per-input": Policy(
        "gradient-per-input",
        "tensor",
        "entry",
        "first-batch",
        "docs/quality.md, 2026",
        pace=0.5,
    ),
    # loud rows and columns get no more than their share
    "balanced-gradient": Policy(
        "balanced-gradient",
        "tensor",
        "entry",
        "first-batch",
        "factored moments: Adafactor, arXiv 1804.04235",
    ),
    # what a bias could do is taken out
    "centred-gradient": Policy(
        "centred-gradient",
        "tensor",
        "entry",
        "first-batch",
        "Centering Neural Network Gradients, Schraudolph 1998",
    ),
    # where training would go, at the memory of one batch's gradients
    "sign-descent": Policy(
        "sign-descent",
        "global",
        "entry",
        "first-batch",
        "LT-SFT's rule by signSGD, arXiv 1802.04434",
        {"batches": 128},
        {"head_start": "auto"},
    ),
    # what batches agree on, which is what Adam goes on moving
    "agreement": Policy(
        "agreement",
        "tensor",
        "entry",
        "first-batch",
        "Dissecting Adam, arXiv 1705.07774",
        {"batches": 8},
    ),
    # how much Adam's step on an entry lowers the loss
    "agreed-gradient": Policy(
        "agreed-gradient",
        "tensor",
        "entry",
        "first-batch",
        "Dissecting Adam, arXiv 1705.07774",
        {"batches": 8},
    ),
}
