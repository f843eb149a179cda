"""Forward and backward passes as CUDA graphs: captured once for each shape of batch, then launched as a whole.

The kernels of a small model can be shorter than the time that Python takes to launch them one by one. A graph of them
is launched at once. The kernels, and the random numbers of dropout, are those of the eager passes.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from runners.config import UserError, first_line
from tasks.common import shapes

WARMUP = 3
"""Batches of a shape that are computed as usual before the next one is captured: libraries set themselves up then."""

MOST = 32
"""Shapes that are captured, the first that have come often enough: each keeps gradients of its own."""

Passes = Callable[[Any], Tensor]


class Captured:
    """The passes for batches of one shape: where they read the batch, and where they leave loss and gradients."""

    def __init__(
        self, passes: Passes, parameters: list[nn.Parameter], batch: Any, stream: torch.cuda.Stream, pool: Any
    ) -> None:
        self.parameters = parameters
        self.batch = tree_map(torch.clone, batch)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream):
            self.loss = passes(self.batch)
        self.gradients = [p.grad for p in parameters]

    def __call__(self, batch: Any) -> Tensor:
        for place, value in zip(tree_leaves(self.batch), tree_leaves(batch), strict=True):
            place.copy_(value, non_blocking=True)
        self.graph.replay()
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        return self.loss


class Graphs:
    """Passes that are captured when their batches have come ``WARMUP`` times, and replayed from then on.

    What they return, and the gradients, are overwritten by the next call. They belong to one model: a graph knows the
    addresses of its parameters and buffers, which may change their values in place and nothing else.

    Args:
        passes: a function of the batch that leaves gradients in the parameters' ``grad`` and returns the loss, without
            anything that the host waits for. A batch is tensors on the GPU, or tuples and lists of them.
        model: whose parameters these are.
        what: names the passes in errors.

    Raises:
        UserError: when called: for a batch of other things than tensors, or passes that cannot be captured.
    """

    def __init__(self, passes: Passes, model: nn.Module, what: str) -> None:
        self.passes, self.what = passes, what
        self.parameters: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.seen: Counter[Any] = Counter()
        self.captured: dict[Any, Captured] = {}
        self.aside = torch.cuda.Stream(self.device)  # capture is not allowed on the usual one
        self.pool = torch.cuda.graph_pool_handle()  # one graph runs at a time, so that they can share memory

    def __call__(self, batch: Any) -> Tensor:
        shape = shapes(batch)
        if shape not in self.captured:
            self.seen[shape] += 1
            if self.seen[shape] <= WARMUP or len(self.captured) == MOST:
                return self._as_usual(batch)
            self.captured[shape] = self._capture(batch)
        return self.captured[shape](batch)

    def _as_usual(self, batch: Any) -> Tensor:
        usual = torch.cuda.current_stream(self.device)
        self.aside.wait_stream(usual)
        with torch.cuda.stream(self.aside):
            loss = self.passes(batch)
        usual.wait_stream(self.aside)
        return loss

    def _capture(self, batch: Any) -> Captured:
        if not all(isinstance(leaf, Tensor) and leaf.device == self.device for leaf in tree_leaves(batch)):
            raise UserError(f"{self.what} needs batches of nothing but tensors on the GPU")
        try:
            return Captured(self.passes, self.parameters, batch, self.aside, self.pool)
        except RuntimeError as error:
            why: BaseException = error
            while why.__context__ is not None:  # the end of a broken capture is an error, too, and says nothing
                why = why.__context__
            raise UserError(f"{self.what} cannot be captured: {first_line(why)}") from error
