"""Turns a model's folder into OpenVINO's form, in float32: `python to_openvino.py FOLDER OUT`, in an environment of its own."""

from __future__ import annotations

import sys

from optimum.exporters.openvino import main_export

if __name__ == "__main__":
    main_export(sys.argv[1], sys.argv[2], task="text-generation-with-past", ov_config=None, stateful=True)
