"""Every row of docs/reference/data-formats.md is read as a run reads it."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from generate.data_formats import FORMS, Form
from PIL import Image

from rankfold.runfile.load import parse
from rankfold.train.prepare import prepare


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.title)
def test_form(form: Form, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in form.rows))
    if form.task == "image-classification":
        for row in form.rows:
            (tmp_path / row["image"]).parent.mkdir()
            Image.new("RGB", (16, 16)).save(tmp_path / row["image"])
    encoder = form.task in ("classification", "token-classification")
    model = (
        _vit(tmp_path)
        if form.task == "image-classification"
        else models["all-minilm-l6-v2" if encoder else "smollm2-135m-instruct"]
    )
    run = parse(
        {
            "model": str(model),
            "task": form.task,
            "data": {"train": str(tmp_path / "rows.jsonl"), "columns": form.columns},
            "method": {"name": "lora", "r": 2, "target_modules": "all-linear"},
            "training": {"max_steps": 1},
            "output": str(tmp_path / "run"),
        }
    )
    prepared = prepare(run)
    assert len(prepared.encoded["train"].rows) == len(form.rows)


def _vit(folder: Path) -> Path:
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8), add_pooling_layer=False).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    return folder / "vit"
