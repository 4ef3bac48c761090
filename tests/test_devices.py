"""The allocator's setting, and who is on a GPU, on a machine that may have none."""

import os

import pytest

from gpt2ds.devices import GPU, prepare_cuda, processes_on_gpu


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_segments_grow_unless_the_user_chose(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    for known in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(known, raising=False)
    prepare_cuda()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv(name, "max_split_size_mb:128")
    prepare_cuda()
    found = [os.environ.get(known) for known in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")]
    assert sorted(filter(None, found)) == ["max_split_size_mb:128"]


def test_without_a_driver_nobody_knows_who_is_on_a_gpu() -> None:
    gpu = GPU(name="none", total_bytes=1, free_bytes=1, nvml_index=99)
    assert processes_on_gpu(gpu) is None
