"""Two processes for every method (promise 7): DDP and FSDP2 over gloo equal one process with the whole batch.

One start for all rows: it takes longer than all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_worker import CASES, STEPS, start, train
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from table import adapter_parameters, assert_same


def test_two_processes_equal_one(tmp_path: Path, subtests: pytest.Subtests) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    script = Path(__file__).with_name("parallel_worker.py")
    logs = [tmp_path / f"log.{rank}" for rank in (0, 1)]
    workers = []
    for rank in (0, 1):
        with open(logs[rank], "w") as log:
            command = [sys.executable, str(script), str(rank), str(tmp_path)]
            workers.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env))
    try:
        # one that fails leaves the other waiting for it
        codes = [workers[0].wait(timeout=400), workers[1].wait(timeout=30)]
    except subprocess.TimeoutExpired:
        codes = [w.poll() for w in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)

    for name, (how, arch, row) in CASES.items():
        with subtests.test(name):
            found = [load_file(tmp_path / f"{name}.{rank}.safetensors") for rank in (0, 1)]
            losses = [[f.pop(f"loss.{step}") for step in range(STEPS)] for f in found]
            # what is to be saved is gathered on the first rank alone
            saved = {k.removeprefix("saved."): found[0].pop(k) for k in list(found[0]) if k.startswith("saved.")}
            assert_same(*found)
            model = start(arch, row, 0)
            wanted = train(arch, model, (0, 1))
            for step in range(STEPS):
                mean = (losses[0][step] + losses[1][step]) / 2
                torch.testing.assert_close(mean, wanted.pop(f"loss.{step}"), rtol=1e-4, atol=1e-5)
            assert found[0].keys() == wanted.keys()
            for key, tensor in wanted.items():
                torch.testing.assert_close(
                    found[0][key], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}"
                )
            if how == "fsdp":
                lasts = {n: p for n, p in found[0].items() if n.startswith("last.")}
                set_peft_model_state_dict(model, saved)
                assert_same({f"last.{n}": p.detach() for n, p in adapter_parameters(model)}, lasts)
