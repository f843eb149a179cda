"""State in 8 bits, a wrapper over any rule."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.adam import Adam
from optimizers.rule import HALF, SCHEMA, Count, Inner, Scalars, State, Wrapper, defines


@dataclass(frozen=True, config=SCHEMA)
class EightBit(Wrapper):
    """8-bit state: block-wise dynamic quantisation of the inner rule's state.

    Each state tensor T is cut into blocks of ``block`` elements; kept are absmax = max |T| of each block and of
    each element the number of the codebook entry that is nearest to T / absmax. A step decodes, runs the inner
    rule in its usual precision, and encodes. The codebook is dynamic (a tree): after the sign, the number of
    leading zeros is a decimal exponent and the rest a linear fraction, so that values have a relative precision
    over seven decades; states that are never negative (the rule's ``nonnegative_state``) use the sign's bit, too.

    ``block`` is 2048 in the paper and 256 in newer versions of bitsandbytes. Tensors of fewer than ``minimum``
    elements stay in 32 bits, and so does the state of parameters that have ``full_precision_state = True``, as
    the stable embedding layer of the paper has (tasks/models/embedding.py); a deep copy of a parameter loses
    the mark. Only floating-point state of the parameter's own shape is encoded. As bitsandbytes, whose code for
    the CPU misses the nearest entry now and then, and as torchao, which wants sizes that are multiples of its block
    of 256.

    Goes around a rule and within other wrappers, whose slow or averaged weights are no statistics that could be
    rounded: lookahead over eightbit over adam. Blocks are of one tensor, so tensors are never joined, and a
    rule with a norm over all of them is refused.
    """

    paper: ClassVar[str] = "Dettmers et al. 2022, arXiv 2110.02861"
    family: ClassVar[str] = "wrapper"
    elementwise: ClassVar[bool] = False
    momentum_state: ClassVar[tuple[str, ...]] = ()

    inner: Inner = Adam()
    block: Count = 2048
    minimum: Count = 4096

    def __post_init__(self) -> None:
        if isinstance(self.inner, Wrapper):
            name = type(self.inner).__name__
            raise ValueError(f"EightBit goes within {name}, whose weights must not be rounded, not around it")
        if self.inner.joint:
            raise ValueError(f"EightBit cannot wrap {type(self.inner).__name__}, which joins all tensors into one")

    def init(self, p: Tensor) -> State:
        state = self.inner.init(p)
        if p.numel() < self.minimum or getattr(p, "full_precision_state", False):
            return state
        coded: State = {}
        for name, value in state.items():
            if value.is_floating_point() and value.shape == p.shape:
                codes, absmax = encode(value, self._book(name, p.device), self.block)
                coded |= {name: codes, f"{name}_absmax": absmax}
            else:
                coded[name] = value
        return coded

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        plain = self._decode(state, p)
        direction = self.inner.update(p, g, plain, c)
        for name, value in plain.items():
            if f"{name}_absmax" in state:
                codes, absmax = encode(value, self._book(name, p.device), self.block)
                state[name].copy_(codes)
                state[f"{name}_absmax"].copy_(absmax)
        return direction

    def gather(self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], c: Scalars) -> Scalars:
        if not defines(self.inner, "gather"):
            return {}  # without all of the state in 32 bits at once
        return self.inner.gather(params, grads, [self._decode(s, p) for p, s in zip(params, states, strict=True)], c)

    def predict(self, p: Tensor, state: State) -> None:
        if defines(self.inner, "predict"):
            self.inner.predict(p, self._decode(state, p))

    def evaluation(self, p: Tensor, state: State) -> Tensor | None:
        return self.inner.evaluation(p, self._decode(state, p)) if defines(self.inner, "evaluation") else None

    def _decode(self, state: State, p: Tensor) -> State:
        """The inner rule's state: of what is in 8 bits a copy, in the precision that the rule gave it."""
        dtype = torch.float32 if p.dtype in HALF else p.dtype
        return {
            name: decode(value, state[f"{name}_absmax"], self._book(name, value.device), self.block).to(dtype)
            if f"{name}_absmax" in state
            else value
            for name, value in state.items()
            if not name.endswith("_absmax")
        }

    def _book(self, name: str, device: torch.device) -> Tensor:
        return codebook(name not in self.inner.nonnegative_state, device)


_BOOKS: dict[tuple[bool, torch.device], Tensor] = {}


def codebook(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 256 values of 8-bit dynamic quantisation, in increasing order, in float32.

    With e = 0 ... 6 leading zeros the decade [0.1, 1] 10^-e is cut into 2^(6-e) equal cells, twice as many
    without a sign, whose middles are the values; the two patterns left over are 0 and 1. There is no -1.
    """
    key = (signed, torch.device(device))
    if key not in _BOOKS:
        middles = []
        for e in range(7):
            edges = torch.linspace(0.1, 1, 2 ** (6 - e if signed else 7 - e) + 1, dtype=torch.float64)
            middles.append((edges[:-1] + edges[1:]) / 2 * 10.0**-e)
        values = torch.cat(middles)
        extremes = torch.tensor([0.0, 1.0], dtype=torch.float64)
        both = [values, -values, extremes] if signed else [values, extremes]
        _BOOKS[key] = torch.cat(both).sort().values.float().to(key[1])
    return _BOOKS[key]


def encode(values: Tensor, book: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes of the values' shape in uint8, and the largest |value| of each block."""
    size = values.numel()
    flat = torch.nn.functional.pad(values.float().flatten(), (0, -size % block)).reshape(-1, block)
    absmax = flat.abs().amax(1)
    scaled = flat / torch.where(absmax > 0, absmax, torch.ones_like(absmax))[:, None]
    codes = torch.bucketize(scaled, (book[1:] + book[:-1]) / 2)
    return codes.flatten()[:size].reshape(values.shape).to(torch.uint8), absmax


def decode(codes: Tensor, absmax: Tensor, book: Tensor, block: int) -> Tensor:
    """The values that the codes stand for."""
    return (book[codes.flatten().int()] * absmax.repeat_interleave(block)[: codes.numel()]).reshape(codes.shape)
