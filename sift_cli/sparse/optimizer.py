"""AdamW over the flat buffer, with the rounding into the weights that belongs to each step."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sift_cli.sparse.adamw import aged_adamw_
from sift_cli.sparse.columns import Columns, Start
from sift_cli.sparse.parameters import Move, SparseParameters
from sift_cli.sparse.support import Support

HISTORIES = ("keep", "reset", "park")
# What is kept of each entry, and what it begins with. All of it follows the entry, is parked and is
# saved. The names are those of torch and of checkpoints; what is added comes last.
COLUMNS: dict[str, Start] = {"exp_avg": 0.0, "exp_avg_sq": 0.0, "ages": 0.0}


class SparseAdamW:
    """AdamW (Loshchilov and Hutter, 2019) over the selected entries: one fused call per step.

    Moments are fp32 and of shape [K], whatever the dtype of the base. Weight decay pulls every
    trained entry towards zero, as torch.optim.AdamW does with the parameters it is given, or
    towards its centre. In scaled coordinates each entry moves by the learning rate times its scale
    and decays as all do: what torch.optim.AdamW does with a group for each scale, of rate
    `lr * scale` and decay `weight_decay / scale`. Gradients are the entries' own, so that clipping
    and eps see what they always see.

    Once the support has changed, every entry counts its own steps for the bias correction.
    `history` says what a change does to moments and counts: `keep` those of the entries that stay
    and forget the rest; `reset` those of every weight whose support may change; `park` those of
    entries that leave, on the host, until they come back.
    """

    def __init__(
        self,
        parameters: SparseParameters,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        history: str = "keep",
    ) -> None:
        self.parameters = parameters
        self.history = history
        self.adamw = torch.optim.AdamW(
            [parameters.flat],
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=True,
        )
        # They live where torch looks for its moments, so that both have the same tensors.
        self.columns = Columns(parameters, COLUMNS, self.adamw.state[parameters.flat])

    @property
    def ages(self) -> Tensor | None:
        """The steps that each entry has taken, [K]; None while all have taken the same number."""
        return self.columns.named.get("ages")

    def clip(self, max_norm: float | None) -> Tensor:
        """Scales the gradient to a 2-norm of at most `max_norm`; returns its norm before, []."""
        norm = self.parameters.norm()
        limit = float("inf") if max_norm is None else max_norm
        torch.nn.utils.clip_grads_with_norm_([self.parameters.flat], limit, norm)
        return norm

    def step(self, skip: Tensor | None = None) -> None:
        """One update from the gradient buffer, written into the weights; then clears the buffer.

        Where `skip` ([]) is not 0, nothing changes but the buffer, and the host need not know
        unless the masters lie there.
        """
        if skip is not None:
            skip = skip.to(self.parameters.flat.device)
        self._begin()
        if self.ages is None:
            self.adamw.found_inf = skip  # type: ignore[attr-defined]
            self.adamw.step()
        else:
            self._aged_step(self.ages, skip)
        self.parameters.write_back()
        self.parameters.zero_grad()

    def move(self, supports: Mapping[str, Support], revert: bool = False) -> Move:
        """Trains `supports` from now on; moments and step counts follow the entries.

        With `revert`, entries that leave go back to their base value.
        """
        self._begin()
        named, masters = self.columns.named, self.parameters.flat.data
        if self.ages is None:
            named["ages"] = torch.full_like(masters, float(named["step"]))
        move = self.parameters.move(supports, revert)
        if self.history == "park":
            self.columns.park(move, masters)
        self.columns.move(move.origin, self._may_change() if self.history == "reset" else ())
        if self.history == "park":
            self.columns.give_back(move.origin, masters=not revert)
        return move

    def state(self) -> dict[str, Tensor]:
        """Moments, step counts and what is parked: all that `load_state` needs, and no copies."""
        self._begin()
        return {"step": self.columns.named["step"], **self.columns.state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from where `state` was taken, for an optimizer over the same support."""
        names = [name for name in self.columns.starts if name != "ages" or name in state]
        self.columns.load_state(state, names)
        self.columns.named["step"] = state["step"].to(self.parameters.flat.device)

    def _begin(self) -> None:
        """Before the first step, makes what torch would make then, and the columns it knows not of.

        No ages yet: as long as the support stays, torch's one count (`step`) is that of all
        entries.
        """
        if "step" in self.columns.named:
            return
        self.columns.named["step"] = torch.zeros((), device=self.parameters.flat.device)
        for name in self.columns.starts:
            if name != "ages":
                self.columns.begin(name)

    def _aged_step(self, ages: Tensor, skip: Tensor | None) -> None:
        goes = 1.0 if skip is None else 1 - skip
        if skip is not None:
            self.parameters.grad.masked_fill_(skip != 0, 0)
        ages += goes
        named, group = self.columns.named, self.adamw.param_groups[0]
        aged_adamw_(
            self.parameters.flat.data,
            self.parameters.grad,
            named["exp_avg"],
            named["exp_avg_sq"],
            ages,
            goes,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def _may_change(self) -> set[str]:
        """The weights of which entries are chosen: all but those that train whole."""
        return {
            segment.name for segment in self.parameters if segment.support.positions is not None
        }
