"""The command that serves a guard model with vLLM, with the flags that suit the model and the device."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# FP8 is computed as such from Ada and Hopper on.
_FP8 = (8, 9)
_GIB = 2**30
# A guard reads a conversation and answers in a few words.
CONTEXT = 8192
# For what is computed on the way, and for the keys and values of many short prompts at a time.
_BESIDE_GIB = 6.0
_LEAST_SHARE, _MOST_SHARE = 0.1, 0.9
# In thousands of millions of parameters, of models whose names do not say.
_SIZES = {"miniguard": 0.6, "wildguard": 7.0, "toxic-prompt": 0.2}
_UNKNOWN_SIZE = 8.0


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device.

    Attributes:
        memory: bytes.
        capability: of CUDA.
    """

    name: str
    memory: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Command:
    """A program to run.

    Attributes:
        environment: what it is to find there besides what is.
        why: a reason for each flag that depends on model or device.
    """

    words: tuple[str, ...]
    environment: dict[str, str]
    why: tuple[str, ...]


def command(model: str, gpu: Gpu | None, *, host: str = "127.0.0.1", port: int = 8000) -> Command:
    """What serves a model.

    Args:
        model: a local folder, or OWNER/NAME of the Hugging Face hub.
        gpu: None for a CPU.
        host: an address to listen on.
        port: of that.
    """
    words = ["vllm", "serve", model, "--host", host, "--port", str(port), "--served-model-name", served(model)]
    # A model's own settings may punish repetition, and the words of a verdict stand in every prompt.
    words += ["--async-scheduling", "--generation-config", "vllm", "--max-model-len", str(_context(model))]
    if gpu is None:
        # Compiled or not makes no difference to its speed, and a minute to its start; and what tells logprobs would be
        # compiled in the midst of the first question, by a C++ compiler that need not be there.
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"}
        cpu = ("no GPU: nothing is compiled, for a quicker start and first answer, and 1 GiB is for keys and values",)
        return Command((*words, "--enforce-eager"), environment, cpu)
    size, why_size = _size(model)
    fp8 = gpu.capability >= _FP8 and "fp8" not in model.lower()
    weights = size * (1 if fp8 else 2) * 1.1
    share = min(max((weights + _BESIDE_GIB) * _GIB / gpu.memory, _LEAST_SHARE), _MOST_SHARE)
    # Rounded up, to whole hundredths.
    share = -(-round(share * 1000) // 10) / 100
    why: tuple[str, ...] = (f"--gpu-memory-utilization {share:g}: {why_size}, on {gpu.memory / _GIB:.0f} GiB",)
    words += ["--gpu-memory-utilization", f"{share:g}"]
    if fp8:
        words += ["--quantization", "fp8"]
        why += (f"--quantization fp8: {gpu.name} computes in it",)
    return Command(tuple(words), {}, why)


def served(model: str) -> str:
    """What a model is called by those who ask it: a folder by its name, for where it lies is nobody's business."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def program() -> str | None:
    """Where vLLM's command is: on the PATH, or beside this Python, whose environment need not be on it."""
    return shutil.which("vllm") or shutil.which("vllm", path=str(Path(sys.executable).parent))


def gpu() -> Gpu | None:
    """The first device that the driver tells of; None without one."""
    found = shutil.which("nvidia-smi")
    if found is None:
        return None
    query = [found, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout  # noqa: S603 - fixed
    except (OSError, subprocess.SubprocessError):
        return None
    return read(told)


def read(told: str) -> Gpu | None:
    """The first device of what nvidia-smi lists, as name, MiB and capability."""
    found = re.match(r"\s*([^,\n]+), *(\d+), *(\d+)\.(\d+)", told)
    if found is None:
        return None
    return Gpu(found[1].strip(), int(found[2]) * 2**20, (int(found[3]), int(found[4])))


def _context(model: str) -> int:
    """Tokens: no more than a local model takes, for vLLM refuses to promise more."""
    try:
        told = json.loads((Path(model) / "config.json").read_bytes()).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return CONTEXT
    return min(told, CONTEXT) if isinstance(told, int) and told > 0 else CONTEXT


def _size(model: str) -> tuple[float, str]:
    """Thousands of millions of parameters, and how that is known."""
    name = model.rstrip("/").rpartition("/")[2].lower()
    if found := re.search(r"(?<![\d.])(\d+(?:\.\d+)?)(b|m)(?![a-z])", name):
        size = float(found[1]) / (1 if found[2] == "b" else 1000)
        return size, f"{found[1]}{found[2].upper()} parameters"
    known = next((size for part, size in _SIZES.items() if part in name), None)
    if known is not None:
        return known, f"{known:g}B parameters"
    return _UNKNOWN_SIZE, f"its size is not in its name, and taken to be {_UNKNOWN_SIZE:g}B parameters"
