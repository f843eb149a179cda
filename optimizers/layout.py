"""How parameters are laid out for a step that does not care where one tensor ends and the next begins."""

import sys
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from optimizers.rule import State

ALONE = 8192
"""Elements from which on compiled execution leaves a tensor where it is: to copy smaller ones costs less."""

PIECE = 131072
"""Elements that flat execution takes at a time on a CPU: so few that what a step computes on its way stays cached."""


class Layout:
    """Those of some parameters that are of one dtype and device, with their state, as few vectors.

    Tensors of at least ``alone`` elements that lie in memory without gaps stay where they are and are seen as
    vectors; copies of all the others are joined into one, which is last. On a CPU these are taken in pieces of at most
    ``piece`` elements. Parameters and gradients themselves stay where the user has them; ``self.states`` are views of
    the state of the parameters.
    """

    def __init__(
        self, at: Sequence[int], params: Sequence[Tensor], states: Sequence[dict[str, Any]], alone: float, piece: int
    ) -> None:
        def stays(p: Tensor) -> bool:
            return p.numel() >= alone and torch.empty_like(p, device="meta").stride() == p.stride()

        self._large = [i for i in at if stays(params[i])]
        self._small = [i for i in at if not stays(params[i])]
        self._kept = [params[i] for i in self._large]
        self._strides = [p.stride() for p in self._kept]
        self._joined = [params[i] for i in self._small]
        self._piece = piece if params[at[0]].device.type == "cpu" else sys.maxsize  # a GPU wants few large ones
        self._parts: list[Tensor] = []
        names = [name for name in states[at[0]] if name != "step"]
        self.vectors: list[Tensor] = []
        self.states: list[State] = []
        for i, p in zip(self._large, self._kept, strict=True):
            state = states[i]
            for name in names:
                if state[name].stride() != p.stride():
                    state[name] = torch.empty_like(p, dtype=state[name].dtype).copy_(state[name])
            self._add(_vector(p), {name: _vector(state[name]) for name in names})
        if self._small:
            whole = _flatten_dense_tensors(self._joined).clone()
            self._parts = list(_unflatten_dense_tensors(whole, self._joined))
            joined = {name: _flatten_dense_tensors([states[i][name] for i in self._small]) for name in names}
            for name, vector in joined.items():
                for i, part in zip(self._small, _unflatten_dense_tensors(vector, self._joined), strict=True):
                    states[i][name] = part
            self._add(whole, joined)

    def _add(self, vector: Tensor, state: State) -> None:
        pieces = self._split(vector)
        columns = {name: self._split(value) for name, value in state.items()}
        self.vectors += pieces
        self.states += [{name: column[i] for name, column in columns.items()} for i in range(len(pieces))]

    def _split(self, vector: Tensor) -> Sequence[Tensor]:
        return (vector,) if vector.numel() <= self._piece else vector.split(self._piece)

    def gather(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Makes ``vectors`` the parameters' values and returns the gradients as vectors."""
        found: list[Tensor] = []
        for i, p, stride in zip(self._large, self._kept, self._strides, strict=True):
            g = grads[i]
            if g.stride() != stride:
                g = torch.empty_like(p, dtype=g.dtype).copy_(g)
            found += self._split(_vector(g))
        if self._small:
            torch._foreach_copy_(self._parts, self._joined)
            found += self._split(_flatten_dense_tensors([grads[i] for i in self._small]))
        return found

    def scatter(self) -> None:
        """Makes the parameters the values of ``vectors``."""
        if self._small:
            torch._foreach_copy_(self._joined, self._parts)


class Layouts:
    """The layouts that are in use."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[Callable[..., bool], list[Layout]]] = {}

    def of(self, params: Sequence[Tensor], states: Sequence[dict[str, Any]], alone: float, piece: int) -> list[Layout]:
        """The layouts of parameters; made anew when these or their state are no longer the same tensors."""
        key = tuple(map(id, params))
        hold, layouts = self._known.get(key, (None, []))
        if hold is None or not hold(params, states, alone, piece):
            for stale in [other for other in self._known if set(other) & set(key)]:
                del self._known[stale]
            alike = places([(p.dtype, p.device) for p in params]).values()
            layouts = [Layout(at, [p.detach() for p in params], states, alone, piece) for at in alike]
            self._known[key] = (_unchanged(params, states, alone, piece), layouts)
        return layouts


def _unchanged(params: Sequence[Tensor], states: Sequence[dict[str, Any]], *how: float) -> Callable[..., bool]:
    """Tells whether parameters and state are still these very tensors, and not what a state_dict was loaded into."""
    # The layouts hold on to the memory, so that no other tensor comes to have one of these addresses.
    addresses = [p.data_ptr() for p in params]
    known = {name: [state[name] for state in states] for name in states[0] if name != "step"}

    def hold(params: Sequence[Tensor], states: Sequence[dict[str, Any]], *now: float) -> bool:
        return (
            now == how
            and [p.data_ptr() for p in params] == addresses
            and all(all(map(is_, [s.get(name) for s in states], tensors)) for name, tensors in known.items())
        )

    return hold


def places(keys: Sequence[Any]) -> dict[Any, list[int]]:
    """Where each key stands in a sequence."""
    found: dict[Any, list[int]] = {}
    if len(set(keys)) == 1:  # as a rule, and quicker
        found[keys[0]] = list(range(len(keys)))
    else:
        for i, key in enumerate(keys):
            found.setdefault(key, []).append(i)
    return found


def _vector(t: Tensor) -> Tensor:
    """A tensor without gaps as a vector, in the order of memory."""
    return t.as_strided((t.numel(),), (1,))
