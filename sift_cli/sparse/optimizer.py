"""AdamW over the flat buffer, with the rounding into the weights that belongs to each step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sift_cli.sparse.adamw import aged_adamw_
from sift_cli.sparse.parameters import Move, SparseParameters
from sift_cli.sparse.segments import Segment, find, merged, positions_of
from sift_cli.sparse.support import Support

HISTORIES = ("keep", "reset", "park")


class SparseAdamW:
    """AdamW (Loshchilov and Hutter, 2019) over the selected entries: one fused call per step.

    Moments are fp32 and of shape [K], whatever the dtype of the base. Weight decay pulls every
    trained entry towards zero, as torch.optim.AdamW does with the parameters it is given.

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
        self.ages: Tensor | None = None  # steps of each entry, [K]; None while all are alike
        self._parked: dict[str, tuple[Tensor, Tensor]] = {}  # positions [P], columns [4, P]

    def clip(self, max_norm: float | None) -> Tensor:
        """Scales the gradient to a 2-norm of at most `max_norm`; returns its norm before."""
        limit = float("inf") if max_norm is None else max_norm
        return torch.nn.utils.clip_grad_norm_([self.parameters.flat], limit)

    def step(self, skip: Tensor | None = None) -> None:
        """One update from the gradient buffer, written into the weights; then clears the buffer.

        Where `skip` ([]) is not 0, nothing changes but the buffer, and the host need not know
        unless the masters lie there.
        """
        if skip is not None:
            skip = skip.to(self.parameters.flat.device)
        if self.ages is None:
            self.adamw.found_inf = skip  # type: ignore[attr-defined]
            self.adamw.step()
        else:
            goes = 1.0 if skip is None else 1 - skip
            if skip is not None:
                self.parameters.grad.masked_fill_(skip != 0, 0)
            self.ages += goes
            state, group = self.adamw.state[self.parameters.flat], self.adamw.param_groups[0]
            aged_adamw_(
                self.parameters.flat.data,
                self.parameters.grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                self.ages,
                goes,
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
        self.parameters.write_back()
        self.parameters.zero_grad()

    def move(self, supports: Mapping[str, Support], revert: bool = False) -> Move:
        """Trains `supports` from now on; moments and step counts follow the entries.

        With `revert`, entries that leave go back to their base value.
        """
        masters, moments, ages = self._state()
        move = self.parameters.move(supports, revert)
        if self.history == "park":
            columns = torch.stack([*moments, ages, masters])
            for segment in move.before:
                self._park(segment, move.left[segment.span], columns[:, segment.span])
        stays = move.origin >= 0
        if self.history == "reset":
            for segment in self.parameters:
                if segment.support.positions is not None:
                    stays[segment.span] = False
        source = move.origin[stays]
        state = self.adamw.state[self.parameters.flat]
        for key, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            state[key] = torch.zeros_like(self.parameters.flat.data)
            state[key][stays] = moment[source]
        self.ages = torch.zeros_like(self.parameters.flat.data)
        self.ages[stays] = ages[source]
        if self.history == "park":
            for segment in self.parameters:
                self._return(segment, move.origin[segment.span] < 0, keep_masters=not revert)
        return move

    def state(self) -> dict[str, Tensor]:
        """Moments, step counts and what is parked: all that `load_state` needs, and no copies."""
        moments = self._moments()
        found = {key: moments[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        if self.ages is not None:
            found["ages"] = self.ages
        for name, (positions, columns) in self._parked.items():
            found[f"parked/{name}/positions"], found[f"parked/{name}/columns"] = positions, columns
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from where `state` was taken, for an optimizer over the same support."""
        device = self.parameters.flat.device
        moments = {key: state[key].to(device) for key in ("step", "exp_avg", "exp_avg_sq")}
        self.adamw.state[self.parameters.flat].update(moments)
        self.ages = state["ages"].to(device) if "ages" in state else None
        self._parked = {
            key.removeprefix("parked/").removesuffix("/positions"): (
                state[key],
                state[key.removesuffix("positions") + "columns"],
            )
            for key in state
            if key.startswith("parked/") and key.endswith("/positions")
        }

    def _moments(self) -> dict[str, Any]:
        """torch's own state of the flat buffer, made where no step was taken yet."""
        flat = self.parameters.flat
        state: dict[str, Any] = self.adamw.state[flat]
        if "exp_avg" not in state:
            state.update(
                step=torch.zeros((), device=flat.device),
                exp_avg=torch.zeros_like(flat.data),
                exp_avg_sq=torch.zeros_like(flat.data),
            )
        return state

    def _state(self) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """Masters, both moments and ages, each [K]."""
        flat, state = self.parameters.flat, self._moments()
        ages = self.ages
        if ages is None:
            ages = torch.full_like(flat.data, float(state["step"]))
        return flat.data, (state["exp_avg"], state["exp_avg_sq"]), ages

    def _park(self, segment: Segment, left: Tensor, columns: Tensor) -> None:
        positions = positions_of(segment.support, left).cpu()
        gone = columns[:, left].cpu()
        if segment.name in self._parked:
            held, kept = self._parked[segment.name]
            positions, gone = merged(held, positions, kept, gone)
        self._parked[segment.name] = positions, gone

    def _return(self, segment: Segment, came: Tensor, keep_masters: bool) -> None:
        if segment.name not in self._parked:
            return
        held, kept = self._parked[segment.name]
        places = came.nonzero().flatten()
        at = find(positions_of(segment.support, came).cpu().to(held.dtype), held)
        known = at >= 0
        columns = kept[:, at[known]].to(self.parameters.flat)
        places = places[known.to(places.device)] + segment.start
        state = self.adamw.state[self.parameters.flat]
        state["exp_avg"][places], state["exp_avg_sq"][places] = columns[0], columns[1]
        assert self.ages is not None
        self.ages[places] = columns[2]
        if keep_masters:
            self.parameters.flat.data[places] = columns[3]
        stays = torch.ones(len(held), dtype=torch.bool)
        stays[at[known]] = False
        self._parked[segment.name] = held[stays], kept[:, stays]
