"""The common subspace of several models of one architecture, computed once and kept in one file (for CoRA).

    subspace = build_subspace(["siblings/a", "siblings/b"], "bases/qkv.safetensors", rank=32)
    subspace.basis_for(Site("model.layers.0.self_attn.q_proj", 64, 64))      # out × rank

For each group of matrices W (out × in) that share a basis, with M = [W_1 | W_2 | …], the basis is the top left singular
vectors of M, taken from the eigenvectors of C = M Mᵀ = Σ W Wᵀ, which is accumulated in float64 one tensor at a time:
no two models, and not even one, are ever in memory. All of this is OUR INTERPRETATION of CoRA (methods/cora.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Site
from rankfold.io.model_folder import ModelFolder, is_target

FORMAT, VERSION = "rankfold-subspace", 1
SCOPES = ("layer", "module", "global")
SOURCES = ("weights", "delta")
SCALES = ("none", "sqrt_sigma")
BASIS, SIGMA = ".basis", ".sigma"  # endings of the file's tensors, behind the key

Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class Subspace:
    """Bases by key, as one file holds them.

    Args:
        bases: out × rank, float32; orthonormal columns, times (σ/σ₁)^½ where `scale` is "sqrt_sigma".
        sigmas: all singular values of M, float64, descending.
        targets: endings of the names of the modules it was built from.
        base: name of the base model, or None.
        models: name of each model and the sha256 of its files, as {"name": …, "files": {…}}.
        hash: sha256 over the tensors in the order of their names.
    """

    bases: Mapping[str, Tensor]
    sigmas: Mapping[str, Tensor]
    scope: str
    source: str
    scale: str
    rank: int
    targets: tuple[str, ...]
    base: str | None
    models: tuple[dict, ...]
    hash: str

    def key_for(self, site: Site) -> str:
        """The key of the site's basis. A prefix before the name does not matter (`bert.encoder…` and `encoder…`).

        Raises:
            ValueError: there is none, or it is of another size.
        """
        key = self._find(self.place_of(site)) if is_target(site.name, self.targets) else None
        if key is None:
            raise RankfoldError(
                f"the subspace has no basis for {site.name}: it was built from {', '.join(self.targets)} of "
                f"{len(self.bases)} {self.scope} group(s), such as {min(self.bases)}; leave the module out of "
                "target_modules, or build a subspace with it"
            )
        if len(self.bases[key]) != site.out_features:
            raise RankfoldError(
                f"the basis {key} has {len(self.bases[key])} rows and {site.name} has {site.out_features} outputs: "
                "this is a basis of another model"
            )
        return key

    def place_of(self, site: Site) -> str:
        """What shares a basis with the site in its own model: the name of its module, of its layer, or "global"."""
        return _key(site.name, self.scope)

    def basis_for(self, site: Site) -> Tensor:
        """out × rank, float32. Its first r columns are the basis of rank r. Raises ValueError as `key_for`."""
        return self.bases[self.key_for(site)]

    def gap(self, key: str, rank: int | None = None) -> float:
        """σ_r/σ_{r+1}. Near 1 the last directions are arbitrary: a little noise would have picked others."""
        return _gap(self.sigmas[key], self.rank if rank is None else rank) or math.inf

    def _find(self, name: str) -> str | None:
        parts = name.split(".")
        for i in range(len(parts)):
            if (key := ".".join(parts[i:])) in self.bases:
                return key
        longer = [key for key in self.bases if key.endswith("." + name)]
        return longer[0] if len(longer) == 1 else None

    def summary(self) -> str:
        """A few lines for people."""
        shares = {k: float(s[: self.rank].square().sum() / s.square().sum()) for k, s in self.sigmas.items()}
        weakest = min(self.bases, key=self.gap)
        return "\n".join(
            [
                f"{len(self.bases)} bases of rank {self.rank}, one for each {self.scope} (scope), from the {self.source} of "
                f"{', '.join(m['name'] for m in self.models)}",
                f"energy kept: {min(shares.values()):.1%} to {max(shares.values()):.1%} of ‖M‖²_F",
                f"smallest gap σ_r/σ_(r+1): {self.gap(weakest):.4g} at {weakest}",
                f"hash {self.hash}",
            ]
        )


def build_subspace(
    models: Sequence[Folder] | Folder,
    out: Folder,
    *,
    base: Folder | None = None,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    scope: str | None = None,
    source: str = "weights",
    rank: int = 32,
    scale: str = "none",
    force: bool = False,
    say: Callable[[str], None] | None = None,
) -> Subspace:
    """Computes the bases and writes them to `out`, whole or not at all.

    Args:
        models: folders of one architecture, as `save_pretrained` writes them (safetensors, sharded or not).
        base: folder of the model they were all tuned from; `source="delta"` needs it.
        targets: endings of the names of the modules whose weights are collected.
        scope: one basis for the targets of each "layer", for each "module", or a single "global" one. By default "layer" where
            the targets of a layer have one output size, else "module" (grouped-query attention).
        source: "weights" W_t, or "delta" W_t − W_0.
        rank: columns to keep. Adapters may use fewer.
        scale: "none", or "sqrt_sigma" for columns of length (σ/σ₁)^½.
        force: replace an existing `out`; adapters trained with it will refuse the new one.
        say: called with one line after each basis.

    Raises:
        FileExistsError: `out` exists and `force` is not given.
        ValueError: an option out of its range, models that do not belong together, or damaged files.
    """
    models = [models] if isinstance(models, str | os.PathLike) else list(models)
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    out = Path(out)
    for name, value, allowed in (("scope", scope, SCOPES), ("source", source, SOURCES), ("scale", scale, SCALES)):
        if value not in allowed and (name, value) != ("scope", None):
            raise RankfoldError(f"build_subspace: {name}={value!r} must be one of {', '.join(allowed)}")
    if not models or not targets:
        raise RankfoldError("build_subspace: give at least one model folder and one name in targets")
    if not isinstance(rank, int) or rank < 1:
        raise RankfoldError(f"build_subspace: rank={rank!r} must be an integer > 0")
    if source == "delta" and base is None:
        raise RankfoldError('build_subspace: source="delta" is W_t - W_0 and needs base, the folder of W_0')
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists; choose another file, or replace it with force (--force)")

    found = [ModelFolder(Path(m), targets) for m in models]
    origin = None if base is None else ModelFolder(Path(base), targets)
    everyone = found if origin is None else [*found, origin]
    reference = min(everyone, key=lambda m: (len(m.prefix), m.prefix))
    for model in everyone:
        model.check_same_architecture(reference)
    # In the order of their content: sums of float64 depend on it, and the basis should not depend on the caller's
    found.sort(key=lambda m: sorted(m.hashes.items()))

    groups = _groups(reference, scope or "layer")
    if scope is None:
        alike = all(len({reference.shapes[m][0] for m in modules}) == 1 for modules in groups.values())
        scope = "layer" if alike else "module"
        groups = _groups(reference, scope)
        if say is not None and not alike:
            say("the targets of a layer have different output sizes: one basis for each module (scope module)")
    for key, modules in groups.items():
        _check_group(key, {m: reference.shapes[m] for m in modules}, rank)
    tensors: dict[str, Tensor] = {}
    for key, modules in groups.items():
        basis, sigma = _top(_gram(found, origin if source == "delta" else None, modules), rank, scale, key, source)
        tensors |= {key + BASIS: basis, key + SIGMA: sigma}
        if say is not None:
            say(f"{key}: σ₁ {sigma[0]:.4g}, σ_r {sigma[rank - 1]:.4g}, σ_r/σ_(r+1) {_gap(sigma, rank) or math.inf:.4g}")
    about = {
        "version": VERSION,
        "scope": scope,
        "source": source,
        "scale": scale,
        "rank": rank,
        "targets": targets,
        "base": origin and origin.about(),
        "models": [m.about() for m in found],
        "gaps": {key: _gap(tensors[key + SIGMA], rank) for key in groups},
        "hash": content_hash(tensors),
    }
    write_subspace(out, tensors, about)
    return load_subspace(out)


def write_subspace(out: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Writes a subspace file under a temporary name and renames it, so that a half-written one is never seen."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        partial = Path(folder, out.name)
        # One entry, since safetensors writes several in any order, and the same subspace should be the same file
        save_file(tensors, partial, metadata={FORMAT: json.dumps(about, sort_keys=True)})
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, out)


def load_subspace(path: Folder) -> Subspace:
    """Reads and checks a subspace file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: truncated, not a subspace, NaN or infinity, or a content that is not the one that was hashed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no subspace file at {path}; `rankfold subspace` writes one")
    try:
        with safe_open(path, "pt") as file:
            ours = (file.metadata() or {}).get(FORMAT)
            tensors = {name: file.get_tensor(name) for name in file.keys()} if ours else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RankfoldError(f"{path} cannot be read; it is truncated or not a safetensors file: {error}") from None
    if not ours:
        raise RankfoldError(f"{path} is not a subspace file; `rankfold subspace` writes one")
    about = json.loads(ours)
    if about["version"] != VERSION:
        raise RankfoldError(f"{path} has version {about['version']} and this rankfold reads {VERSION}; build it again")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise RankfoldError(f"{path} has NaN or infinity in {name}; build it again")
    if content_hash(tensors) != about["hash"]:
        raise RankfoldError(
            f"{path} was changed after it was written: its content does not have the hash that it states"
        )
    return Subspace(
        bases={name.removesuffix(BASIS): t for name, t in tensors.items() if name.endswith(BASIS)},
        sigmas={name.removesuffix(SIGMA): t for name, t in tensors.items() if name.endswith(SIGMA)},
        scope=about["scope"],
        source=about["source"],
        scale=about["scale"],
        rank=about["rank"],
        targets=tuple(about["targets"]),
        base=about["base"] and about["base"]["name"],
        models=tuple(about["models"]),
        hash=about["hash"],
    )


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over name, type, shape and bytes of each tensor, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _groups(reference: ModelFolder, scope: str) -> dict[str, list[str]]:
    """The modules that share a basis, by key and by their name behind the prefix."""
    groups: dict[str, list[str]] = {}
    for module in reference.shapes:
        groups.setdefault(_key(reference.prefix + module, scope), []).append(module)
    return groups


def _key(module: str, scope: str) -> str:
    """The module's key: its own name, the name up to its depth, or one for all."""
    if scope == "module":
        return module
    parts = module.split(".")
    depth = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return "global" if scope == "global" or depth is None else ".".join(parts[: depth + 1])


# --- the mathematics


def _check_group(key: str, shapes: Mapping[str, tuple[int, int]], rank: int) -> None:
    outs = {module: out for module, (out, _) in shapes.items()}
    if len(set(outs.values())) > 1:
        some = {size: module for module, size in outs.items()}
        raise RankfoldError(
            f"build_subspace: the modules of {key} have different output sizes "
            f"({', '.join(f'{m}: {n}' for n, m in some.items())}), so no basis fits them all (grouped-query attention "
            'has this); use scope="module"'
        )
    (out,) = set(outs.values())
    if rank > out:
        raise RankfoldError(
            f"build_subspace: rank={rank} exceeds {out}, the output size at {key}; choose rank <= {out}"
        )


def _gram(models: Sequence[ModelFolder], origin: ModelFolder | None, modules: Sequence[str]) -> Tensor:
    """C = Σ_t Σ_module W Wᵀ (or of W_t − W_0), out × out in float64."""
    gram = None
    for module in modules:
        start = None if origin is None else origin.weight(module)
        for model in models:
            w = model.weight(module)
            w = w if start is None else w - start
            gram = w.new_zeros(len(w), len(w)) if gram is None else gram
            gram.addmm_(w, w.T)
    assert gram is not None
    return gram


def _top(gram: Tensor, rank: int, scale: str, key: str, source: str) -> tuple[Tensor, Tensor]:
    """The basis, out × rank, and all σ, descending."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    eigenvalues, vectors = eigenvalues.flip(0).clamp_min(0.0), vectors.flip(1)[:, :rank]
    # Below this an eigenvalue is rounding, and its vector means nothing
    known = int((eigenvalues > len(gram) * torch.finfo(gram.dtype).eps * eigenvalues[0]).sum())
    if known < rank:
        what = "the models' weights" if source == "weights" else "the differences from the base"
        raise RankfoldError(
            f"build_subspace: rank={rank} exceeds {known}, the rank of {what} at {key}; "
            + (
                f"choose rank <= {known}, or give more models"
                if known
                else "the models do not differ from the base here"
            )
        )
    sigma = eigenvalues.sqrt()
    largest = vectors.abs().argmax(0)
    basis = vectors * vectors.gather(0, largest[None]).sign()  # eigh leaves the sign open
    if scale == "sqrt_sigma":
        basis = basis * (sigma[:rank] / sigma[0]).sqrt()
    return basis.float().contiguous(), sigma


def _gap(sigma: Tensor, rank: int) -> float | None:
    """σ_r/σ_{r+1}; None where there is nothing below."""
    below = float(sigma[rank]) if rank < len(sigma) else 0.0
    return float(sigma[rank - 1]) / below if below else None
