"""`rankfold inspect` on a chain: each finished link's rank and norm, in JSON, in the terminal and as a picture."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from rich.console import Console

from rankfold import RacLoraConfig, attach
from rankfold.commands import inspect as command
from rankfold.inspect import inspect_adapter
from rankfold.inspect.terminal import show_adapter


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with 4 links of rank 2 in 4 modules."""
    folder = tmp_path_factory.mktemp("chain")
    torch.manual_seed(1)
    config = hf.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=48
    )
    hf.LlamaForCausalLM(config).save_pretrained(folder / "base")
    base = hf.LlamaForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, RacLoraConfig(r=2, links=4, target_modules=["q_proj", "down_proj"]))  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    attach(model, optimizer, total_steps=8)
    ids = torch.randint(0, 48, (2, 8))
    for _ in range(8):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(str(folder / "run" / "adapter"))
    return folder / "run" / "adapter"


def test_links_are_told(chain: Path) -> None:
    found = inspect_adapter(chain)
    assert [(link.step, link.rank) for link in found.links] == [(2, 8), (4, 8), (6, 8)]
    # what the adapter holds is the sum of its links and of the live pair, so no longer than they are together
    assert found.norm < sum(link.norm for link in found.links) + found.links[-1].norm * 5
    assert json.loads(found.to_json())["links"][0]["rank"] == 8
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(show_adapter(found, 80))
    assert "3 finished links, of rank 24 together, tied after steps 2 to 6" in console.export_text().replace("\n", " ")


def test_links_are_drawn_beside_the_heat_map(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = command.Options(path=str(chain), picture=str(tmp_path / "seen.svg"))
    assert command.run(options) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"seen.svg", "seen-links.svg"}
    assert "seen-links.svg" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"seen\.svg"):
        command.run(options)
