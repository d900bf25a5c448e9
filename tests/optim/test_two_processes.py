"""Two processes over gloo: DDP leaves the same factors on both, those of one process with the whole batch; FSDP2 is refused."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from two_processes import CASES, METHODS, start, train


def test_two_processes(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    logs = [tmp_path / f"log.{rank}" for rank in (0, 1)]
    workers = []
    for rank in (0, 1):
        with open(logs[rank], "w") as log:
            command = [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(rank), str(tmp_path)]
            workers.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env))
    try:
        codes = [workers[0].wait(timeout=240), workers[1].wait(timeout=30)]
    except subprocess.TimeoutExpired:
        codes = [w.poll() for w in workers]  # one that fails leaves the other waiting for it
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)

    for name, (cls, options) in CASES.items():
        first, second = (load_file(tmp_path / f"{name}.{rank}.safetensors") for rank in (0, 1))
        model = start(name)
        whole = train(model, cls(model, lr=0.01, **options), slice(0, 4))
        assert first.keys() == whole.keys()
        for n, value in first.items():
            assert torch.equal(value, second[n]), (name, n)
            torch.testing.assert_close(
                value, whole[n], rtol=0, atol=1e-7, msg=lambda m, n=n, name=name: f"{name} {n}: {m}"
            )

    for rank in (0, 1):
        said = ast.literal_eval((tmp_path / f"said.{rank}").read_text(encoding="utf-8"))
        assert said.keys() == {*CASES, "before"} - {"lora_plus", *METHODS}
        assert "were replaced after it was made" in said.pop("before")
        assert all("sharded over processes" in text for text in said.values())
