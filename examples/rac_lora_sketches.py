"""One frozen sketch stalls, fresh sketches converge: why RAC-LoRA (arXiv 2410.08305) draws a factor anew for every link.

    python examples/rac_lora_sketches.py                    # writes rac_lora_sketches.svg; about two minutes

f(W) = ½ Σ M_ij (W − W*)_ij² on 3×3 matrices, M = 1 but for M_00 = 10, rank 1, from W = 0, step 1/L = 1/10. Each link takes the closed
form of the theory: W ← W − γ·∇f(W)·H, H the projector of a sketch on the right, or its mirror on the left. W* is ours; the
paper's linear term was not found. "rankfold" is the real adapter, trained through `rankfold.attach` with solver="exact_gd".
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Side = Literal["right", "left"]

M = torch.ones(3, 3, dtype=torch.float64)
M[0, 0] = 10.0
GAMMA = 0.1  # 1/L
#: W*, without a pattern that a sketch could favour; f(0) = 21.65.
I, J = torch.arange(3.0, dtype=torch.float64)[:, None], torch.arange(3.0, dtype=torch.float64)
TARGET = 2 * torch.sin(1 + 1.7 * I + 0.9 * J + 0.6 * I * J)


def f(w: Tensor) -> Tensor:
    return 0.5 * (M * (w - TARGET).square()).sum()


def gradient(w: Tensor) -> Tensor:
    return M * (w - TARGET)


def projector(sketch: Tensor) -> Tensor:
    """H = S(SᵀS)⁺Sᵀ of the columns of a d × r sketch."""
    return sketch @ torch.linalg.pinv(sketch.T @ sketch, hermitian=True) @ sketch.T


def descend(side: Side, sketches: Iterable[Tensor]) -> list[float]:
    """f at the start and after each link of projected gradient descent, one link per sketch (3 × r)."""
    w = torch.zeros_like(TARGET)
    values = [f(w).item()]
    for sketch in sketches:
        h, g = projector(sketch), gradient(w)
        w = w - GAMMA * (g @ h if side == "right" else h @ g)
        values.append(f(w).item())
    return values


def fresh(links: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return list(torch.randn(links, 3, 1, generator=g, dtype=torch.float64))


def frozen(links: int, seed: int = 0) -> list[Tensor]:
    return fresh(1, seed) * links


def stalls_at(side: Side, sketch: Tensor) -> float:
    """The least f that one frozen sketch can reach: with W in its span, each row (right) or column is a weighted fit."""
    v, least = sketch[:, 0], 0.0
    for i in range(3):
        weights, target = (M[i], TARGET[i]) if side == "right" else (M[:, i], TARGET[:, i])
        c = (weights * v * target).sum() / (weights * v * v).sum()
        least += 0.5 * (weights * (target - c * v).square()).sum().item()
    return least


def with_rankfold(side: Side, links: int) -> tuple[list[float], list[Tensor]]:
    """The same descent by the adapter itself: f before each link and at the end, and the sketches that it drew."""
    from peft import get_peft_model

    from rankfold import RacLoraConfig, attach

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 3, bias=False)).double()
    nn.init.zeros_(base[0].weight)  # pyright: ignore[reportArgumentType]
    config = RacLoraConfig(r=1, lora_alpha=1, side=side, solver="exact_gd", target_modules=["0"])
    model: Any = get_peft_model(base, config).double()  # pyright: ignore[reportArgumentType]
    adapter = model.base_model.model[0].lowrank_adapters["default"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=GAMMA)
    attach(model, optimizer)
    values, sketches = [], []

    def weight() -> Tensor:
        return model(torch.eye(3, dtype=torch.float64)).T

    for _ in range(links):
        sketches.append((adapter.down.T if side == "right" else adapter.up).detach().clone())
        optimizer.zero_grad()
        loss = f(weight())
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return [*values, f(weight()).item()], sketches


def plot(curves: dict[str, list[float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, values in curves.items():
        colour = "#c44e52" if "right" in name else "#4878a8"
        style = {"fresh": "-", "frozen": "--", "rankfold": ":"}[name.split()[0].removesuffix("'s")]
        ax.semilogy(
            [max(v, 1e-32) for v in values], style, color=colour, label=name, linewidth=3 if style == ":" else 1.6
        )
    ax.set(xlabel="link", ylabel="f(W)", ylim=(1e-31, 1e2))
    ax.set_title(
        "A frozen sketch stalls, fresh sketches converge (3×3 quadratic, rank 1, step 1/L)", fontsize=9, loc="left"
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, frameon=False)
    fig.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(fig)


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path("rac_lora_sketches.svg"), help=".svg or .png")
    args = parser.parse_args(argv)
    curves: dict[str, list[float]] = {}
    sides: tuple[Side, ...] = ("right", "left")
    for side in sides:
        curves[f"fresh sketches, {side}"] = descend(side, fresh(args.links))
        curves[f"frozen sketch, {side}"] = descend(side, frozen(args.links))
        curves[f"rankfold's adapter, {side}"] = with_rankfold(side, args.links)[0]
        floor = stalls_at(side, fresh(1)[0])
        print(f"{side:5}  a frozen sketch cannot fall below {floor:.4f}")
    for name, values in curves.items():
        print(f"{name:28} {values[0]:8.4f} -> {values[-1]:.4g}")
    plot(curves, args.out)
    print(f"wrote {args.out}")
    return curves


if __name__ == "__main__":
    main()
