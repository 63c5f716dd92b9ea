"""The command that serves a guard model fits the model and the device."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import TYPE_CHECKING

import pytest

from guardmw.backends import _command
from guardmw.backends._command import Gpu, command, gpu, read
from guardmw.cli import main

if TYPE_CHECKING:
    from pathlib import Path

MODEL = "prem-research/MiniGuard-v0.1"
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * 2**30, (9, 0))
T4 = Gpu("Tesla T4", 15 * 2**30, (7, 5))


def test_a_small_guard_takes_a_small_part_of_a_large_gpu() -> None:
    """In FP8, as published."""
    words = command(MODEL, H100).words
    assert words[:3] == ("vllm", "serve", MODEL)
    assert words[words.index("--gpu-memory-utilization") + 1] == "0.1"
    assert words[words.index("--quantization") + 1] == "fp8"
    assert "--async-scheduling" in words


@pytest.mark.parametrize(
    ("model", "device", "share"),
    [
        (MODEL, T4, 0.49),
        ("meta-llama/Llama-Guard-3-8B", H100, 0.19),
        ("meta-llama/Llama-Guard-3-8B", T4, 0.9),
        ("acme/Guard-500M", T4, 0.48),
        ("acme/unheard-of", H100, 0.19),
        ("Qwen/Qwen3Guard-Gen-0.6B", H100, 0.1),
    ],
)
def test_the_share_of_memory_follows_from_the_size(model: str, device: Gpu, share: float) -> None:
    """As the name tells it, in half as many bytes where the device computes in FP8."""
    words = command(model, device).words
    assert float(words[words.index("--gpu-memory-utilization") + 1]) == pytest.approx(share, abs=0.011)


@pytest.mark.parametrize(("model", "device"), [(MODEL, T4), ("nvidia/Guard-8B-FP8", H100)])
def test_what_is_or_cannot_be_fp8_is_not_made_so(model: str, device: Gpu) -> None:
    """Weights that are quantised already say so themselves."""
    assert "--quantization" not in command(model, device).words


def test_a_cpu_starts_quickly_and_keeps_its_memory() -> None:
    """Nothing is compiled."""
    made = command(MODEL, None, host="0.0.0.0", port=9)  # noqa: S104 - what a user may want
    assert "--enforce-eager" in made.words
    assert made.environment == {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"}
    assert made.words[made.words.index("--port") + 1] == "9"
    assert "--gpu-memory-utilization" not in made.words


@pytest.mark.parametrize(("told", "context"), [(2048, "2048"), (40_960, "8192"), (None, "8192"), ("?", "8192")])
def test_a_local_model_is_not_asked_for_more_than_it_takes(tmp_path: Path, told: object, context: str) -> None:
    """VLLM would refuse to start."""
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": told}), encoding="utf-8")
    words = command(str(tmp_path), None).words
    assert words[words.index("--max-model-len") + 1] == context


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ("NVIDIA H100 80GB HBM3, 81920, 9.0\nNVIDIA H100, 1, 9.0\n", H100),
        ("Tesla T4, 15360, 7.5\n", T4),
        ("", None),
        ("No devices were found\n", None),
        ("NVIDIA GB10, [N/A], 12.1\n", None),
    ],
)
def test_the_first_device_is_read(told: str, found: Gpu | None) -> None:
    """Or none, where its memory is not told."""
    assert read(told) == found


def test_a_driver_that_fails_is_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one that is not there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu() is None
    (tmp_path / "nvidia-smi").write_text(f"#!{sys.executable}\nimport sys; sys.exit(9)\n", encoding="utf-8")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert gpu() is None


def test_the_command_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With its reasons, and what to do then, as lines that a shell passes over."""
    monkeypatch.setattr(_command, "gpu", lambda: None)
    assert main(["serve-model", "my models/guard", "--port", "9000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [line] = [line for line in lines if not line.startswith("#")]
    words = shlex.split(line)
    assert words[:2] == ["VLLM_CPU_KVCACHE_SPACE=1", "TORCH_COMPILE_DISABLE=1"]
    assert words[2:5] == ["vllm", "serve", "my models/guard"]
    assert "# then: --backend vllm:http://127.0.0.1:9000/v1#my models/guard" in lines


def test_a_folder_is_served_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it lies stays out of specs and verdicts."""
    monkeypatch.setattr(_command, "gpu", lambda: None)
    (tmp_path / "miniguard").mkdir()
    words = command(f"{tmp_path}/miniguard/", None).words
    assert words[words.index("--served-model-name") + 1] == "miniguard"
    assert main(["serve-model", str(tmp_path / "miniguard")]) == 0
    assert capsys.readouterr().out.endswith("/v1#miniguard\n")


def test_what_a_folder_says_of_its_dialect_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its card, where its name does not."""
    monkeypatch.setattr(_command, "gpu", lambda: None)
    (tmp_path / "card.json").write_text('{"name": "mine", "dialect": "nemotron"}', encoding="utf-8")
    assert main(["serve-model", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(f"/v1#{tmp_path.name}?dialect=nemotron\n")


@pytest.mark.parametrize("card", ["{", '{"dialect": "nemtron"}'])
def test_a_broken_card_is_said_before_anything_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], card: str
) -> None:
    """A command that stands above an error would be run."""
    monkeypatch.setattr(_command, "gpu", lambda: None)
    (tmp_path / "card.json").write_text(card, encoding="utf-8")
    assert main(["serve-model", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert "card.json" in printed.err


def test_settings_that_a_model_brings_do_not_bend_its_answers() -> None:
    """Such as a punishment of words that stand in the prompt already, as those of a verdict do."""
    words = command(MODEL, H100).words
    assert words[words.index("--generation-config") + 1] == "vllm"


@pytest.mark.parametrize("on_the_path", [True, False])
def test_the_command_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on_the_path: bool) -> None:
    """In the place of this process, with what its environment is to hold; beside this Python is near enough."""
    (tmp_path / "vllm").write_text("", encoding="utf-8")
    (tmp_path / "vllm").chmod(0o755)
    elsewhere = str(tmp_path / "elsewhere")
    monkeypatch.setenv("PATH", str(tmp_path) if on_the_path else elsewhere)
    monkeypatch.setattr(sys, "executable", f"{elsewhere if on_the_path else tmp_path}/python")
    ran = []

    def become(*given: object) -> None:
        ran.append(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "execve", become)
    assert main(["serve-model", MODEL, "--run"]) == 130
    [(program, words, environment)] = ran
    assert program == str(tmp_path / "vllm")
    assert words[:3] == ["vllm", "serve", MODEL]
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment["PATH"] == os.environ["PATH"]


def test_a_missing_vllm_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With what installs it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert main(["serve-model", MODEL, "--run"]) == 2
    assert "pip install 'guardmw[vllm]'" in capsys.readouterr().err
