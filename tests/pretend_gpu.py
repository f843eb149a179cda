"""A GPU that is not there: what would go wrong on one goes wrong on it, on any machine.

Within ``pretend_gpu()`` tensors can be put on the device ``GPU``. They say that they are there and are computed by the
CPU. An operation on tensors there and here together is refused as CUDA refuses it, and so is one that CUDA cannot
repeat to the bit; whatever makes the host wait for the device is noted. CUDA graphs can be captured and replayed: what
Python does is not repeated then, and to wait while capturing is an error. What only a real one can show is not seen:
its kernels, cuDNN, autocast, streams, memory and time.
"""

import contextlib
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)

COPIES = {"_to_copy", "copy_", "_foreach_copy_"}
WAITING = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nonzero",
    "repeat_interleave", "unique_consecutive", "unique_dim",
}  # fmt: skip
"""Operations whose result, or its shape, the host needs."""
UNREPEATABLE = {
    "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "_ctc_loss_backward", "_embedding_bag",
    "_histogramdd_from_bin_cts", "adaptive_max_pool2d_backward", "avg_pool3d_backward",
    "fractional_max_pool2d_backward", "fractional_max_pool3d_backward", "grid_sampler_2d_backward",
    "grid_sampler_3d_backward", "histc", "max_unpool2d", "max_unpool3d", "median", "nll_loss2d_forward", "put_",
    "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward", "scatter_reduce",
    "scatter_reduce_", "upsample_bicubic2d_backward", "upsample_bilinear2d_backward", "upsample_linear1d_backward",
    "upsample_trilinear3d_backward",
}  # fmt: skip
"""What torch.use_deterministic_algorithms lists as refused on CUDA; some of them only with some arguments."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Which count the true ones where an index is boolean."""


class There(Tensor):
    """A tensor on the GPU: ``value`` is what it holds.

    For torch itself it is on the device meta, which needs no driver.
    """

    value: Tensor
    device: torch.device = GPU  # type: ignore[assignment]
    is_cuda: bool = True  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, value: Tensor) -> "There":
        made: There = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            device="meta",
        )  # fmt: skip
        made.value = value
        return made

    def __repr__(self, **_: Any) -> str:
        return f"There({self.value})"

    def tolist(self) -> Any:
        """Torch's own does not go through an operation."""
        return self.cpu().tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        """Torch's own makes a tensor of the device meta."""
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("used outside of pretend_gpu()")


class Pretending(TorchDispatchMode):
    """Carries out operations; ``waits`` names those for which the host would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.capturing: Graph | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [t for t in tensors if isinstance(t, There)]
        here = [t for t in tensors if not isinstance(t, There)]
        name = func._schema.name.removeprefix("aten::")
        asked = kwargs.get("device")
        to_gpu = bool(there) if asked is None else torch.device(asked).type in ("cuda", "meta")
        if name in COPIES:
            if name != "_to_copy":
                to_gpu = all(isinstance(leaf, There) for leaf in tree_leaves(args[0]))
            blocking = not (kwargs.get("non_blocking") or (name != "_to_copy" and args[2:3] == (True,)))
            if there and not to_gpu:
                self._wait(f"{name} from the GPU")
            elif here and to_gpu and blocking:
                self._wait(f"{name} to the GPU")
        elif there:
            # Indices may be anywhere, but those that are here are sent there.
            indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)] if name in INDEXING else []
            if any(t.dim() and not any(t is index for index in indices) for t in here):
                raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found cuda and cpu")
            if name in UNREPEATABLE:
                raise RuntimeError(f"{name} does not have a deterministic implementation")
            if name in WAITING or any(i.dtype == torch.bool or not isinstance(i, There) for i in indices):
                self._wait(name)
        given = tree_map(_value, (args, kwargs))
        if asked is not None:
            given[1]["device"] = torch.device("cpu")
        if self.capturing is not None:
            arguments = zip(func._schema.arguments, given[0], strict=False)
            self.capturing.keep([v for a, v in arguments if a.alias_info and a.alias_info.is_write])
            if name == "native_batch_norm":
                self.capturing.keep(list(given[0][3:5]))  # running statistics, of which its schema does not speak
        out = func(*given[0], **given[1])
        if self.capturing is not None and (there or to_gpu):
            self.capturing.calls.append((func, *given, out))
        if not to_gpu:
            return out
        wrapped = tree_map(lambda leaf: There(leaf) if isinstance(leaf, Tensor) else leaf, out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped

    def _wait(self, name: str) -> None:
        if self.capturing is not None:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        self.waits.append(name)


class Graph:
    """In place of torch.cuda.CUDAGraph: operations on values, with the memory where their results are."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, values: list[Any]) -> None:
        """Remember memory as it is before it is written for the first time."""
        for value in (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)):
            storage = value.untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
            self.before.setdefault(storage.data_ptr(), (whole, whole.clone()))

    def captured(self) -> None:
        """Capturing computes nothing: what was written is as it was, and what is new is not there yet."""
        known = set(self.before)
        for whole, value in self.before.values():
            whole.copy_(value)
        for _, args, kwargs, out in self.calls:
            known |= {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
            for leaf in filter(_is_tensor, tree_leaves(out)):
                if leaf.untyped_storage().data_ptr() not in known and leaf.is_floating_point():
                    leaf.fill_(torch.nan)

    def replay(self) -> None:
        """All operations again, from and to the same memory."""
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for place, value in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if _is_tensor(place) and place.data_ptr() != value.data_ptr():
                        place.copy_(value)


class Stream:
    """In place of torch.cuda.Stream: all of them are one."""

    def __init__(self, device: torch.device | None = None) -> None:
        pass

    def wait_stream(self, other: "Stream") -> None:
        pass


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _value(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, There) else leaf


@contextlib.contextmanager
def pretend_gpu() -> Iterator[list[str]]:
    """Within this context ``GPU`` can be used as a device; the list grows by what the host would have waited for."""
    swap, lift = torch.__future__.get_swap_module_params_on_conversion(), torch._C._only_lift_cpu_tensors()
    pretending = Pretending()

    @contextlib.contextmanager
    def capture(graph: Graph, pool: Any = None, stream: Any = None) -> Iterator[None]:
        pretending.capturing, drawn = graph, torch.get_rng_state()
        try:
            yield
        finally:
            pretending.capturing = None
            torch.set_rng_state(drawn)
        graph.captured()

    with contextlib.ExitStack() as stack:
        for owner, name, instead in (
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.Tensor, "pin_memory", lambda self, *_: self),
            (torch.cuda, "set_device", lambda device: None),
            (torch.cuda, "CUDAGraph", Graph),
            (torch.cuda, "graph", capture),
            (torch.cuda, "graph_pool_handle", lambda: None),
            (torch.cuda, "Stream", Stream),
            (torch.cuda, "stream", contextlib.nullcontext),
            (torch.cuda, "current_stream", Stream),
        ):
            stack.enter_context(unittest.mock.patch.object(owner, name, instead))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=GPU) is made here and copied
        torch.__future__.set_swap_module_params_on_conversion(True)  # or module.to(GPU) unties tied weights
        try:
            with pretending:
                yield pretending.waits
        finally:
            torch._C._set_only_lift_cpu_tensors(lift)
            torch.__future__.set_swap_module_params_on_conversion(swap)
