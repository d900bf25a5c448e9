"""`rankfold train --profile`: a few steps under torch's profiler, as a page to read and a trace to open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from rankfold.io.files import to_json, write_whole
from rankfold.kernel.gated_mlp import _GatedMlp
from rankfold.kernel.linears import _LowRankLinears

#: What is left out at first (allocations, caches), and what is measured then.
SKIP, STEPS = 3, 3
#: Heading → how the profiler's events of its parts begin, which for an autograd node is its class's name. Forward and backward of a part are events of their own, none in another.
PARTS = {
    "adapted layers, with the base's products": (_LowRankLinears.__name__, _GatedMlp.__name__),
    "attention": ("aten::scaled_dot_product_attention", "ScaledDotProduct"),
    "optimiser": ("Optimizer.step#",),
}


class Profile(TrainerCallback):
    """Profiles steps 4 to 6 of a run and writes `profile.json` and `profile.txt`, and the trace `profile-trace.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen, self.profiler = 0, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seen == SKIP and state.is_world_process_zero:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self.profiler = profile(activities=activities)
            self.profiler.__enter__()
        self.seen += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiler is not None and self.seen == SKIP + STEPS:
            self._finish(STEPS)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiler is not None:  # a run that is shorter
            self._finish(self.seen - SKIP)

    def _finish(self, steps: int) -> None:
        profiler, self.profiler = self.profiler, None
        assert profiler is not None
        profiler.__exit__(None, None, None)
        events = profiler.key_averages()
        found = shares(events)
        lines = [f"where the time of {steps} steps went", ""]
        lines += [f"{share:6.1%}  {name}" for name, share in found.items()]
        column = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        lines += ["", events.table(sort_by=column, row_limit=30, max_name_column_width=60)]
        write_whole(self.folder / "profile.txt", "\n".join(lines) + "\n")
        write_whole(self.folder / "profile.json", to_json({"steps": steps, "shares": found}))
        profiler.export_chrome_trace(str(self.folder / "profile-trace.json"))


def shares(events: Any) -> dict[str, float]:
    """Part of a step → its share of the time, of `PARTS` and the rest (embedding, norms, loss, data)."""
    on_gpu = torch.cuda.is_available()
    total = sum(e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events) or 1.0
    found = {}
    for name, beginnings in PARTS.items():
        own = [e for e in events if e.key.startswith(beginnings)]
        found[name] = sum(e.device_time_total if on_gpu else e.cpu_time_total for e in own) / total
    return {**found, "all else": max(1.0 - sum(found.values()), 0.0)}
