"""A DINOv2 in an ONNX file as a folder that transformers loads; made once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from rankfold.io.cache import cached_folder
from rankfold.io.files import sha256

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

#: How DINOv2 was shown images (its card on the hub), but small: 8 × 8 patches, which a CPU can train on.
PIXELS = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 112},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 112, "width": 112},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}


def cached_dinov2(path: Path, name: str) -> Path:
    """The cached folder of the DINOv2 in an ONNX file, under `name` and the hash of the content."""

    def build(folder: Path) -> None:
        logger.info("converting %s to safetensors, once, into %s", path, folder.parent)
        _write(path, folder)

    return cached_folder(f"{name}-{sha256(path)[:16]}", build)


def _write(path: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    found = read_onnx(path)
    weights = {k.removeprefix("backbone."): v for k, v in found.items() if k.startswith("backbone.")}
    # The table of positions is split where the model interpolates it: the class token's, and those of the patches.
    (places,) = (v for v in found.values() if v.ndim == 3 and v.shape[1] > 1)
    (first,) = (v for k, v in found.items() if v.shape == (1, 1, places.shape[2]) and not k.startswith("backbone."))
    weights["embeddings.position_embeddings"] = torch.cat([first, places], 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    width, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    config = Dinov2Config(
        architectures=["Dinov2Model"],
        dtype="float32",
        hidden_size=width,
        num_hidden_layers=sum(name.endswith("norm1.weight") for name in weights),
        num_attention_heads=width // 64,
        patch_size=patch,
        image_size=patch * round(places.shape[1] ** 0.5),
        use_mask_token=False,
    )
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS, indent=2) + "\n")


def read_onnx(path: Path) -> dict[str, Tensor]:
    """The float32 tensors of an ONNX file by name.

    What a MatMul multiplies by has no name of its own in exported models; it gets that of the bias that is added behind it, with
    `weight` for `bias`, and is turned to out × in.
    """
    import onnx
    import torch

    graph = onnx.load(path).graph
    floats = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in floats}
    products: dict[str, str] = {}  # output of a MatMul → the tensor that it multiplies by
    for node in graph.node:
        known = next((name for name in node.input if name in tensors), None)
        if known and node.op_type == "MatMul":
            products[node.output[0]] = known
        elif known and (factor := next((products[name] for name in node.input if name in products), None)):
            tensors[known.removesuffix("bias") + "weight"] = tensors.pop(factor).T.contiguous()
    return tensors
