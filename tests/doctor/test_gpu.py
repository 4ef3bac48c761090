"""The doctor's checks of cards, on what NVML would say of machines that are not here."""

from dataclasses import replace

import pytest

from gpt2ds.devices import GPU, MIB, Machine
from gpt2ds.doctor.finding import Finding
from gpt2ds.doctor.gpu import Driver, TorchBuild, check_cards, check_peers, check_torch, torch_build

GIB = 2**30
CPU = Machine(cpu_name="a CPU", cores=2, host_memory_bytes=24 * GIB)
RTX_4090 = GPU(name="NVIDIA GeForce RTX 4090", total_bytes=24_564 * MIB, free_bytes=24_207 * MIB)
A6000 = replace(RTX_4090, name="NVIDIA RTX A6000")
NEW_TORCH, OLD_TORCH, CPU_TORCH = (
    TorchBuild(version="2.13.0", cuda="13.0"),
    TorchBuild(version="2.13.0", cuda="12.6"),
    TorchBuild(version="2.13.0+cpu", cuda=None),
)
ADA = ("NVIDIA GeForce RTX 4090", (8, 9))
TWO_ADA = Driver(version="580.65.06", cuda=(13, 0), cards=(ADA, ADA))


@pytest.mark.parametrize(
    ("build", "driver", "level", "words"),
    [
        (None, None, "problem", ["pip install torch"]),
        (CPU_TORCH, None, "ok", ["on the CPU"]),
        (NEW_TORCH, None, "warning", ["--gpus all"]),
        (CPU_TORCH, TWO_ADA, "problem", ["built with CUDA"]),
        (NEW_TORCH, TWO_ADA, "ok", ["580.65.06", "CUDA 13.0", "(8.9)"]),
        (OLD_TORCH, TWO_ADA, "ok", ["CUDA 12.6"]),
        # Within a major version an older driver does.
        (OLD_TORCH, replace(TWO_ADA, version="525.60.13", cuda=(12, 0)), "ok", ["525.60.13"]),
        (NEW_TORCH, replace(TWO_ADA, version="550.54.14", cuda=(12, 4)), "problem", ["too old", "580", "CUDA 12"]),
        (NEW_TORCH, replace(TWO_ADA, cards=(("Tesla V100", (7, 0)),)), "problem", ["no code for Tesla V100", "12.6"]),
        (OLD_TORCH, replace(TWO_ADA, cards=(("RTX 5090", (12, 0)),)), "problem", ["no code for RTX 5090", "12.8"]),
        (NEW_TORCH, Driver(error="Driver/library version mismatch"), "problem", ["mismatch", "Restart"]),
    ],
)
def test_torch_against_the_driver(
    build: TorchBuild | None, driver: Driver | None, level: str, words: list[str]
) -> None:
    finding = check_torch(build, driver)
    assert finding.level == level, finding
    assert all(word in finding.found + finding.fix for word in words), finding
    assert bool(finding.fix) == (level != "ok")


def test_the_installed_torch_is_read_without_importing_it() -> None:
    import torch

    assert torch_build() == TorchBuild(version=torch.__version__, cuda=torch.version.cuda)


@pytest.mark.parametrize(
    ("gpus", "reached", "disabled", "level", "words"),
    [
        ([RTX_4090] * 2, True, "", "warning", ["RTX 4090", "NCCL_P2P_DISABLE=1"]),
        ([RTX_4090] * 2, None, "", "warning", ["does not say"]),
        ([RTX_4090] * 2, False, "", "ok", ["host's memory"]),
        ([RTX_4090] * 2, True, "1", "ok", ["Off by NCCL_P2P_DISABLE"]),
        ([A6000] * 2, True, "", "ok", ["directly"]),
        ([A6000] * 2, True, "1", "warning", ["unset NCCL_P2P_DISABLE"]),
    ],
)
def test_peer_to_peer(
    gpus: list[GPU],
    reached: bool | None,
    disabled: str,
    level: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", disabled)
    assert check_peers(gpus[:1], reached) is None
    finding = check_peers(gpus, reached)
    assert finding is not None and finding.level == level
    assert all(word in finding.found + finding.fix for word in words), finding


def test_cards_that_are_hidden_named_wrong_or_held(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(visible: str, *gpus: GPU) -> list[Finding]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        return list(check_cards(replace(CPU, gpus=gpus), TWO_ADA, usable=True))

    (hidden,) = told("")
    assert (hidden.level, hidden.fix) == ("warning", "unset CUDA_VISIBLE_DEVICES")
    assert [finding.level for finding in told("0,7", RTX_4090)] == ["warning", "ok"]
    assert [finding.level for finding in told("0,1", RTX_4090, RTX_4090)] == ["ok"]
    (held,) = told("0,1", RTX_4090, replace(RTX_4090, free_bytes=4 * GIB))
    assert held.level == "warning" and "20.0 of 24.0 GiB are held" in held.found
    assert not list(check_cards(CPU, None, usable=True))
