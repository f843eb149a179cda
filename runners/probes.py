"""What a run records about itself, in buffers on the device, read when it is over."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from runners.config import Run

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
BINS = torch.linspace(-12.0, 2.0, 57, dtype=torch.float64)
"""Edges of the histogram of log10 |gradient|; what lies outside is counted in the first or last bin."""


class Recorder:
    """Loss, learning rate and warmup factor of every step; the rest at the steps that the run's probes list.

    ``before_step`` is called when gradients are there, ``after_step`` when parameters have moved.
    """

    def __init__(self, run: Run, model: nn.Module, device: torch.device) -> None:
        self.run = run
        self.parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
        self.count = sum(p.numel() for p in self.parameters)
        probes, n = run.probes, run.steps
        self.norm_steps = probes.steps("norms", n)
        self.l1_steps = probes.steps("l1_norms", n)
        self.quantile_steps = probes.steps("update_quantiles", n)
        self.histogram_steps = probes.steps("gradient_histogram", n)

        def column(*width: int) -> Tensor:
            return torch.full((n, *width), torch.nan, device=device, dtype=torch.float32)

        self.buffers = {name: column() for name in ("loss", "gradient_norm", "update_rms")}
        if self.l1_steps:
            self.buffers["gradient_l1"] = column()
        if self.quantile_steps:
            self.buffers["quantiles"] = column(len(QUANTILES))
        if self.histogram_steps:
            self.buffers["histogram"] = column(len(BINS) - 1)
            self._edges = BINS.to(device)
        self._before: list[Tensor] | None = None
        self._checked = 0

    @torch.no_grad()
    def before_step(self, t: int, loss: Tensor) -> None:
        """Record step t's loss and gradients."""
        self.buffers["loss"][t - 1] = loss
        if t in self.norm_steps:
            self.buffers["gradient_norm"][t - 1] = torch.nn.utils.get_total_norm(self._gradients())
        if t in self.l1_steps:
            self.buffers["gradient_l1"][t - 1] = torch.nn.utils.get_total_norm(self._gradients(), 1.0)
        if t in self.histogram_steps:
            logs = torch.cat([g.flatten() for g in self._gradients()]).abs().log10()
            edges = self._edges.to(logs)
            logs = logs.nan_to_num(neginf=float(BINS[0])).clamp(float(BINS[0]), float(BINS[-1]))
            index = (torch.bucketize(logs, edges, right=True) - 1).clamp(0, len(edges) - 2)
            self.buffers["histogram"][t - 1] = torch.zeros_like(edges[1:]).index_add_(0, index, torch.ones_like(logs))
        if t in self.norm_steps or t in self.quantile_steps:
            self._before = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def after_step(self, t: int) -> None:
        """Record how far step t moved the parameters."""
        if self._before is None:
            return
        moved = torch._foreach_sub(self._before, self.parameters)
        self._before = None
        if t in self.norm_steps:
            self.buffers["update_rms"][t - 1] = torch.nn.utils.get_total_norm(moved) / self.count**0.5
        if t in self.quantile_steps:
            sizes = torch.cat([m.flatten() for m in moved]).abs() / self.run.peak_lr
            # torch.quantile refuses more than 2^24 elements: take order statistics instead.
            ranks = [round(q * (len(sizes) - 1)) for q in QUANTILES]
            ordered = sizes.sort().values
            # One by one: a list of places would be copied to a GPU, and waited for.
            self.buffers["quantiles"][t - 1] = torch.stack([ordered[rank] for rank in ranks])

    def first_bad(self, bound: float, t: int) -> int | None:
        """The first step up to t whose loss is not finite or above the bound. Waits for the device."""
        losses = self.buffers["loss"][self._checked : t].cpu()
        bad = torch.nonzero(~(losses <= bound)).flatten()
        step = self._checked + int(bad[0]) + 1 if len(bad) else None
        self._checked = t
        return step

    def tables(self, last: int) -> dict[str, pd.DataFrame]:
        """The recorded steps 1..last as tables: ``history``, one row a step, and one for each listed probe."""
        t = torch.arange(1, last + 1, dtype=torch.float64)
        warmup = self.run.warmup.factor(t, self.run.optimizer.second_moment_beta)
        lr = self.run.peak_lr * warmup * self.run.decay.factor(t, self.run.steps)
        columns: dict[str, Any] = {"step": np.arange(1, last + 1), "lr": lr.numpy(), "warmup": warmup.numpy()}
        for name in ("loss", "gradient_norm", "update_rms", *(["gradient_l1"] if self.l1_steps else [])):
            columns[name] = self.buffers[name][:last].cpu().numpy()
        tables = {"history": pd.DataFrame(columns)}
        for steps, buffer, names in (
            (self.quantile_steps, "quantiles", [f"q{round(100 * q)}" for q in QUANTILES]),
            (self.histogram_steps, "histogram", [f"{edge:g}" for edge in BINS[:-1].tolist()]),
        ):
            listed = sorted(s for s in steps if s <= last)
            if steps:
                rows = self.buffers[buffer].cpu()[[s - 1 for s in listed]].numpy()
                tables[buffer] = pd.DataFrame(rows, columns=names)
                tables[buffer].insert(0, "step", listed)
        return tables

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"buffers": self.buffers, "checked": self._checked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        for name, buffer in self.buffers.items():
            buffer.copy_(state["buffers"][name])
        self._checked = state["checked"]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]
