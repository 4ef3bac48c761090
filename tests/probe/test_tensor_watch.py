"""The observer of a real run's tensors: windows apart from what is between them, and nothing left behind."""

import torch
import torch.distributed as dist

from gpt2ds.probe.tensor_watch import TensorWatch

MIB = 2**20


def test_a_window_is_measured_by_itself() -> None:
    wait = dist.Work.wait
    with TensorWatch() as watch:
        kept = torch.zeros(MIB // 4)
        before = torch.zeros(4 * MIB // 4)
        del before
        assert watch.begin_step() == 5 * MIB
        within = torch.zeros(2 * MIB // 4)
        del within
        assert watch.end_step() == 3 * MIB
        assert watch.begin_step() == MIB, "what was freed before the window counts no more"
        kept = kept + 1  # the old one lives until the new one is there
        assert watch.end_step() == 2 * MIB
        for _ in range(100):
            watch.begin_step()
            watch.end_step()
        assert len(watch.live.phases) == 1, "a run of many steps must not fill the memory that it watches"
        assert dist.Work.wait is not wait
    assert dist.Work.wait is wait
    assert torch.zeros(1).sum() == 0 and watch.live.current_bytes == MIB
