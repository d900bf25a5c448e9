"""The common subspace of several models: the mathematics, the model folders it reads, the file it keeps."""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankfold.host.adapter import Site
from rankfold.io.model_folder import ModelFolder
from rankfold.methods import cora_subspace as room
from rankfold.methods.cora_subspace import Subspace, build_subspace, content_hash, load_subspace

D, IN, LAYERS = 12, 20, 2
NAMES = [f"model.layers.{i}.attn.{p}_proj" for i in range(LAYERS) for p in "qkv"]


def orthonormal(d: int, r: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, r, dtype=torch.float64)).Q


def random_weights(out: int = D, dtype: torch.dtype = torch.float32, names: list[str] = NAMES) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.randn(out, IN).to(dtype) for name in names}


def folder(path: Path, weights: dict[str, Tensor], kind: str = "toy") -> Path:
    """A model folder as `save_pretrained` lays it out, of a kind that transformers does not know."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": kind}))
    extra = {"model.embed.weight": torch.ones(3, 2), "model.layers.0.attn.q_proj.bias": torch.ones(D)}
    save_file({k: v.contiguous() for k, v in {**extra, **weights}.items()}, path / "model.safetensors")
    return path


def site(name: str, out: int = D) -> Site:
    return Site(name, IN, out)


def projector(basis: Tensor) -> Tensor:
    return basis.double() @ basis.double().T


def same_span(a: Tensor, b: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(projector(a), projector(b), rtol=0, atol=atol)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [folder(tmp_path / name, random_weights()) for name in ("one", "two", "three")]


# The mathematics ----------------------------------------------------------------------------------------------------


def test_planted_subspace_is_recovered(tmp_path: Path) -> None:
    planted = {i: orthonormal(64, 4) for i in range(LAYERS)}
    paths = []
    for t in range(3):
        weights = {}
        for name in NAMES:
            noise = 1e-3 * torch.randn(64, 96, dtype=torch.float64)
            weights[f"{name}.weight"] = (
                planted[int(name.split(".")[2])] @ torch.randn(4, 96, dtype=torch.float64) + noise
            ).float()
        paths.append(folder(tmp_path / str(t), weights))
    found = build_subspace(paths, tmp_path / "b.safetensors", rank=4)
    for i in range(LAYERS):
        basis = found.basis_for(site(f"model.layers.{i}.attn.q_proj", 64))
        same_span(basis, planted[i], atol=2e-4)
        assert found.gap(f"model.layers.{i}") > 100 > 10 > found.gap(f"model.layers.{i}", 3)


@pytest.mark.parametrize("scope", room.SCOPES)
def test_basis_is_the_left_singular_vectors(models: list[Path], tmp_path: Path, scope: str) -> None:
    found = build_subspace(models, tmp_path / "b.safetensors", rank=5, scope=scope)
    assert len(found.bases) == {"layer": LAYERS, "module": len(NAMES), "global": 1}[scope]
    tensors = [load_file(m / "model.safetensors") for m in models]
    for name in NAMES:
        together = {
            "layer": [n for n in NAMES if n.split(".")[2] == name.split(".")[2]],
            "module": [name],
            "global": NAMES,
        }[scope]
        m = torch.cat([t[f"{n}.weight"].double() for t in tensors for n in together], 1)
        u, sigma, _ = torch.linalg.svd(m, full_matrices=False)
        basis, key = found.basis_for(site(name)), found.key_for(site(name))
        assert basis.dtype == torch.float32
        torch.testing.assert_close(basis.T @ basis, torch.eye(5), rtol=0, atol=1e-6)
        same_span(basis, u[:, :5])
        same_span(basis[:, :2], u[:, :2])  # the bases of lower rank are its first columns
        torch.testing.assert_close(found.sigmas[key], sigma, rtol=1e-12, atol=0)
        assert found.gap(key) == pytest.approx(float(sigma[4] / sigma[5]))
        largest = basis.gather(0, basis.abs().argmax(0)[None])
        assert (largest > 0).all()


def test_order_of_the_models_is_no_matter(models: list[Path], tmp_path: Path) -> None:
    a = build_subspace(models, tmp_path / "a.safetensors", rank=3)
    b = build_subspace([models[2], models[0], models[1]], tmp_path / "b.safetensors", rank=3)
    assert a.hash == b.hash
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("copies", [2, 3])
def test_copies_give_the_basis_of_one(models: list[Path], tmp_path: Path, copies: int) -> None:
    one = build_subspace(models[0], tmp_path / "one.safetensors", rank=3)
    many = build_subspace([models[0]] * copies, tmp_path / "many.safetensors", rank=3)
    for key, basis in one.bases.items():
        torch.testing.assert_close(many.bases[key], basis, rtol=0, atol=1e-6)
        torch.testing.assert_close(many.sigmas[key], one.sigmas[key] * copies**0.5)


def test_delta_sees_what_tuning_changed(tmp_path: Path) -> None:
    start = {k: 10 * v for k, v in random_weights().items()}
    planted = orthonormal(D, 2)
    base = folder(tmp_path / "base", start)
    tuned = [
        folder(tmp_path / str(t), {k: (v + planted @ torch.randn(2, IN).double()).float() for k, v in start.items()})
        for t in range(2)
    ]
    delta = build_subspace(tuned, tmp_path / "d.safetensors", base=base, source="delta", rank=2)
    weights = build_subspace(tuned, tmp_path / "w.safetensors", base=base, rank=2)
    assert (delta.base, delta.source, weights.source) == ("base", "delta", "weights")
    for key in delta.bases:
        same_span(delta.bases[key], planted, atol=1e-4)
        assert (projector(weights.bases[key]) - projector(planted)).norm() > 0.5


def test_scaled_columns_have_the_root_of_sigma(models: list[Path], tmp_path: Path) -> None:
    plain = build_subspace(models, tmp_path / "a.safetensors", rank=4)
    scaled = build_subspace(models, tmp_path / "b.safetensors", rank=4, scale="sqrt_sigma")
    for key, sigma in scaled.sigmas.items():
        length = (sigma[:4] / sigma[0]).sqrt().float()
        torch.testing.assert_close(scaled.bases[key], plain.bases[key] * length, rtol=1e-5, atol=1e-7)
    assert plain.hash != scaled.hash


def test_half_precision_is_widened_first(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        weights = random_weights(dtype=dtype)
        half = folder(tmp_path / f"{dtype}", weights)
        wide = folder(tmp_path / f"{dtype}-wide", {k: v.float() for k, v in weights.items()})
        a, b = (build_subspace(m, tmp_path / f"{m.name}.safetensors", rank=3) for m in (half, wide))
        assert a.hash == b.hash


# Model folders ------------------------------------------------------------------------------------------------------


def test_sharded_models(models: list[Path], tmp_path: Path) -> None:
    whole = load_file(models[0] / "model.safetensors")
    names = sorted(whole)
    sharded = folder(tmp_path / "sharded", {})
    (sharded / "model.safetensors").unlink()
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({n: whole[n] for n in names[i::3]}, sharded / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    a = build_subspace(models[0], tmp_path / "a.safetensors", rank=3)
    b = build_subspace(sharded, tmp_path / "b.safetensors", rank=3)
    assert a.hash == b.hash
    assert len(b.models[0]["files"]) == 3
    (sharded / file).unlink()
    with pytest.raises(ValueError, match=r"model-00003-of-00003.*missing"):
        build_subspace(sharded, tmp_path / "c.safetensors", rank=3)


def test_gpt2_is_transposed(tmp_path: Path) -> None:
    """Its Conv1D keeps in × out; for the square c_proj nothing but the model's code tells."""
    config = hf.GPT2Config(vocab_size=8, n_positions=4, n_embd=D, n_layer=1, n_head=2)
    model = hf.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "gpt2")
    found = build_subspace(tmp_path / "gpt2", tmp_path / "b.safetensors", targets=["c_proj"], scope="module", rank=3)
    for name in ("attn.c_proj", "mlp.c_proj"):
        w = model.transformer.h[0].get_submodule(name).weight.detach().T
        basis = found.basis_for(Site(f"transformer.h.0.{name}", w.shape[1], D))
        same_span(basis, torch.linalg.svd(w.double()).U[:, :3])


def test_the_prefix_of_the_names_is_no_matter(tmp_path: Path) -> None:
    config = hf.BertConfig(
        hidden_size=D, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=8, num_labels=3
    )
    tall, bare = hf.BertForSequenceClassification(config), hf.BertModel(config)
    tall.save_pretrained(tmp_path / "tall")
    bare.save_pretrained(tmp_path / "bare")
    kinds = ["query", "key", "value"]
    for t, models in enumerate((["tall", "bare"], ["bare"], ["tall"])):
        found = build_subspace([tmp_path / m for m in models], tmp_path / f"{t}.safetensors", targets=kinds, rank=2)
        for model in (tall, bare):
            for name, module in model.named_modules():
                if name.endswith(tuple(kinds)):
                    assert found.basis_for(Site(name, D, D)).shape == (D, 2)
                    assert module.out_features == D
    delta = build_subspace(
        tmp_path / "tall", tmp_path / "d.safetensors", base=tmp_path / "bare", source="delta", targets=kinds, rank=2
    )
    m = torch.cat([getattr(tall.bert.encoder.layer[1].attention.self, k).weight for k in kinds], 1)
    m = m - torch.cat([getattr(bare.encoder.layer[1].attention.self, k).weight for k in kinds], 1)
    same_span(delta.basis_for(Site("encoder.layer.1.attention.self.key", D, D)), torch.linalg.svd(m.double()).U[:, :2])


@pytest.mark.parametrize("scope", room.SCOPES)
def test_never_a_whole_model_in_memory(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    seen: list[weakref.ref] = []
    most = 0
    read = ModelFolder.weight

    def watched(self: ModelFolder, module: str) -> Tensor:
        nonlocal most
        w = read(self, module)
        seen.append(weakref.ref(w))
        most = max(most, sum(ref() is not None for ref in seen))
        return w

    monkeypatch.setattr(ModelFolder, "weight", watched)
    build_subspace(models[:2], tmp_path / "b.safetensors", base=models[2], source="delta", rank=3, scope=scope)
    assert len(seen) == 3 * len(NAMES)
    assert most <= 3  # the base's, a model's, and the one that is being replaced


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "head"}, "scope='head' must be one of layer, module, global"),
        ({"source": "grads"}, "source='grads'"),
        ({"scale": "sigma"}, "scale='sigma'"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"rank": D + 1}, f"rank={D + 1} exceeds {D}, the output size"),
        ({"source": "delta"}, "needs base"),
        ({"targets": ["q_proj", "up_proj"]}, "targets up_proj name no weight .* k_proj, q_proj, v_proj"),
        ({"targets": []}, "at least one"),
    ],
)
def test_bad_options(models: list[Path], tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_subspace(models, tmp_path / "new" / "b.safetensors", **{"rank": 3, **options})
    assert not (tmp_path / "new").exists()


def test_no_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one model"):
        build_subspace([], tmp_path / "b.safetensors")


def test_grouped_query_attention_needs_scope_module(tmp_path: Path) -> None:
    weights = random_weights()
    weights |= {k: v[: D // 2] for k, v in weights.items() if "q_proj" not in k}
    model = folder(tmp_path / "gqa", weights)
    for scope in ("layer", "global"):
        with pytest.raises(ValueError, match=r'different output sizes .*use scope="module"'):
            build_subspace(model, tmp_path / "b.safetensors", rank=2, scope=scope)
    said: list[str] = []
    for options in ({"scope": "module"}, {"say": said.append, "force": True}):
        found = build_subspace(model, tmp_path / "b.safetensors", rank=2, **options)
        assert found.scope == "module"
        assert found.basis_for(site(NAMES[0])).shape == (D, 2)
        assert found.basis_for(site(NAMES[1], D // 2)).shape == (D // 2, 2)
    assert "different output sizes" in said[0]


def test_models_that_do_not_belong_together(models: list[Path], tmp_path: Path) -> None:
    strangers = {
        "wide": folder(tmp_path / "wide", random_weights(out=D + 1)),
        "deep": folder(tmp_path / "deep", random_weights(names=[*NAMES, "model.layers.2.attn.q_proj"])),
        "kind": folder(tmp_path / "kind", random_weights(), kind="other"),
    }
    for name, message in (("wide", "one architecture: .*q_proj|k_proj"), ("deep", r"2\.attn"), ("kind", "one kind")):
        with pytest.raises(ValueError, match=message):
            build_subspace([models[0], strangers[name]], tmp_path / "b.safetensors", rank=2)
        with pytest.raises(ValueError, match=message):
            build_subspace(models[0], tmp_path / "b.safetensors", rank=2, base=strangers[name], source="delta")


def test_directions_that_do_not_exist_are_not_invented(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the models do not differ from the base here"):
        build_subspace(models[0], tmp_path / "b.safetensors", base=models[0], source="delta", rank=1)
    thin = {k: (orthonormal(D, 2) @ torch.randn(2, IN).double()).float() for k in random_weights()}
    model = folder(tmp_path / "thin", {k: v.double() for k, v in thin.items()})
    with pytest.raises(ValueError, match=r"rank=8 exceeds \d, the rank of the models' weights"):
        build_subspace(model, tmp_path / "b.safetensors", rank=8)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("damage", ["nan", "truncated", "pickle", "no config", "quantised", "adapter", "fused"])
def test_damaged_models(tmp_path: Path, damage: str) -> None:
    weights = random_weights()
    name = f"{NAMES[4]}.weight"
    match damage:
        case "nan":
            weights[name][1, 2] = torch.nan
            message = f"NaN or infinity in {name}"
        case "quantised":
            weights[name] = weights[name].to(torch.int8)
            message = "unquantised"
        case "fused":
            weights[name] = torch.randn(2, D, IN)
            message = "linear layers"
        case "truncated":
            message = "truncated"
        case "pickle":
            message = "no model.safetensors"
        case "no config":
            message = "config.json cannot be read"
        case _:
            message = "is an adapter; merge it"
    model = folder(tmp_path / "model", weights)
    file = model / "model.safetensors"
    match damage:
        case "truncated":
            file.write_bytes(file.read_bytes()[:-100])
        case "pickle":
            file.rename(model / "pytorch_model.bin")
        case "no config":
            (model / "config.json").unlink()
        case "adapter":
            (model / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        build_subspace(model, tmp_path / "b.safetensors", rank=2)
    assert not (tmp_path / "b.safetensors").exists()


# The file -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(models: list[Path], tmp_path: Path) -> Path:
    build_subspace(models, tmp_path / "bases" / "qkv.safetensors", rank=3)
    return tmp_path / "bases" / "qkv.safetensors"


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, honest: bool = False, **changes: object) -> None:
    with safe_open(path, "pt") as opened:
        about = json.loads(opened.metadata()[room.FORMAT])
    tensors = load_file(path) if tensors is None else tensors
    if honest:
        changes["hash"] = content_hash(tensors)
    save_file(tensors, path, metadata={room.FORMAT: json.dumps({**about, **changes})})


def test_what_the_file_holds(file: Path, models: list[Path]) -> None:
    found = load_subspace(file)
    assert (found.scope, found.source, found.scale, found.rank) == ("layer", "weights", "none", 3)
    assert found.targets == ("q_proj", "k_proj", "v_proj")
    assert sorted(m["name"] for m in found.models) == ["one", "three", "two"]
    assert all(len(digest) == 64 for m in found.models for digest in m["files"].values())
    assert set(found.bases) == {"model.layers.0", "model.layers.1"}
    assert "rank 3" in found.summary()
    assert found.hash[:8] in found.summary()
    assert list(file.parent.iterdir()) == [file]


def test_which_modules_it_serves(file: Path) -> None:
    found = load_subspace(file)
    assert found.key_for(site(NAMES[0])) == found.key_for(site(NAMES[2])) == "model.layers.0"
    assert found.key_for(site("wrapped." + NAMES[3])) == found.key_for(site("layers.1.attn.q_proj")) == "model.layers.1"
    for name in ("model.layers.2.attn.q_proj", "model.layers.0.attn.o_proj", "lm_head"):
        with pytest.raises(ValueError, match=f"no basis for {name}"):
            found.basis_for(site(name))
    with pytest.raises(ValueError, match=r"12 rows .* 13 outputs: this is a basis of another model"):
        found.basis_for(site(NAMES[0], D + 1))


def test_bad_files(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_subspace(file)
        file.write_bytes(whole)

    for size in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused("truncated or not a safetensors file")
    file.write_bytes(b"PK\x03\x04" * 50)
    refused("truncated or not a safetensors file")
    save_file({"lora_A": torch.ones(2)}, file)
    refused("is not a subspace file")
    rewrite(file, version=2)
    refused("version 2 and this rankfold reads 1")
    for bad in (torch.nan, torch.inf):
        tensors = load_file(file)
        tensors["model.layers.1.basis"][2, 1] = bad
        rewrite(file, tensors, honest=True)
        refused("NaN or infinity in model.layers.1.basis")
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    file.write_bytes(flipped)
    refused("changed after it was written")
    rewrite(file, {k: v for k, v in load_file(file).items() if "layers.1" not in k})
    refused("changed after it was written")
    assert isinstance(load_subspace(file), Subspace)
    with pytest.raises(FileNotFoundError, match="rankfold subspace"):
        load_subspace(tmp_path / "absent.safetensors")


def test_an_existing_file_is_kept_unless_forced(file: Path, models: list[Path]) -> None:
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match="force"):
        build_subspace(models[0], file, rank=3)
    with pytest.raises(ValueError, match="exceeds"):
        build_subspace(models[0], file, rank=99, force=True)
    assert file.read_bytes() == before
    build_subspace(models[0], file, rank=3, force=True)
    assert file.read_bytes() != before


def test_a_failed_write_leaves_nothing(file: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        build_subspace(models[0], file, rank=2, force=True)
    assert list(file.parent.iterdir()) == [file]
    assert file.read_bytes() == before


def test_progress_has_a_line_for_each_basis(models: list[Path], tmp_path: Path) -> None:
    lines: list[str] = []
    build_subspace(models, tmp_path / "b.safetensors", rank=D, say=lines.append)
    assert [line.partition(":")[0] for line in lines] == ["model.layers.0", "model.layers.1"]
