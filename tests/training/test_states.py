"""What of the states needs no ranks: the course of a loss scale, with DeepSpeed's own classes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig, LossScaleProfile, LossScaler

from gpt2ds.training.states import OptimizerStates

DYNAMIC = {"init_scale": 65536, "scale_window": 10, "min_scale": 1, "delayed_shift": 2}


def fused() -> Any:
    """The loss scale of ZeRO-1, 2 and 3."""
    return DynamicLossScaler(65536, 10, 1, 2, False, False, torch.half)


def unfused() -> Any:
    """That of ZeRO-0."""
    return LossScaleConfig(torch.float16, True, 1.0, DYNAMIC, profile=LossScaleProfile.UNFUSED)


def states_with(**optimizer: Any) -> OptimizerStates:
    """The states of an engine that holds a loss scale and nothing else."""
    states = object.__new__(OptimizerStates)
    states.optimizer = SimpleNamespace(update_lp_params=lambda: None, **optimizer)
    states.tiles, states._stage_3 = [], False
    return states


@pytest.mark.parametrize("other_stage", [False, True])
def test_a_dynamic_loss_scale_goes_on_as_it_was(other_stage: bool) -> None:
    scaler = fused()
    # As after four steps, three that overflowed and six more.
    scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_scale, scaler.cur_hysteresis = 13, 6, 16384.0, 1
    saved = states_with(loss_scaler=scaler).loss_scale

    if other_stage:
        config = unfused()
        states_with(loss_scale_config=config).finish(13, saved)
        assert (config.cur_scale, config.cur_iter, config.last_overflow_iter) == (16384, 13, 6)
        return
    again = fused()
    states_with(loss_scaler=again).finish(13, saved)
    for _ in range(12):
        assert vars(again) == vars(scaler)
        scaler.update_scale(False)
        again.update_scale(False)
    assert again.cur_scale == 2 * 16384, "after ten steps without an overflow"


def test_a_fixed_loss_scale_is_the_profiles() -> None:
    fixed = LossScaler(scale=128.0)
    states = states_with(loss_scaler=fixed)
    assert states.loss_scale == {}
    states.finish(5, {"cur_scale": 4.0})
    assert fixed.cur_scale == 128.0
    assert states_with().loss_scale == {}
