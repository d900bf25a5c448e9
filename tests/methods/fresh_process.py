"""Run by test_table_state.py as a program: loads what it saved, and writes what the loaded models answer.

python fresh_process.py FOLDER   with FOLDER/<row>/<arch>/ holding one PEFT folder with two adapters
"""

import sys
from pathlib import Path

import torch
from models import ARCHS
from peft import PeftModel
from safetensors.torch import save_file

import rankfold  # noqa: F401

if __name__ == "__main__":
    for folder in sorted(Path(sys.argv[1]).glob("*/*/")):
        arch = ARCHS[folder.name]
        answers = {}
        model = PeftModel.from_pretrained(arch.build(), folder)
        answers["default"] = arch.out(model)
        model.load_adapter(folder / "other", "second")
        model.set_adapter("second")
        answers["other"] = arch.out(model)
        if arch.task != "SEQ_CLS":
            model.base_model.set_adapter(["default", "second"])
            answers["both"] = arch.out(model)
        answers["pickled"] = arch.out(torch.load(folder / "model.pt", weights_only=False))
        save_file({k: v.contiguous() for k, v in answers.items()}, folder / "answers.safetensors")
