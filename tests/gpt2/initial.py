"""The initial standard deviations of a model of 12 layers, tensor by tensor."""

import math

import torch

EXPECTED_STDS = {
    "wte.weight": 0.02,
    "wpe.weight": 0.01,
    "attn.c_attn.weight": 0.02,
    "mlp.c_fc.weight": 0.02,
    "attn.c_proj.weight": 0.02 / math.sqrt(2 * 12),
    "mlp.c_proj.weight": 0.02 / math.sqrt(2 * 12),
}


def check_initial(name: str, parameter: torch.Tensor) -> None:
    """Fails unless the parameter is as GPT-2 begins: biases 0, gains 1, matrices normal with their std."""
    parameter = parameter.detach()
    if parameter.dim() == 1:
        assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        return
    (std,) = [value for suffix, value in EXPECTED_STDS.items() if name.endswith(suffix)]
    assert abs(float(parameter.std()) / std - 1) < 0.03, name
    assert abs(float(parameter.mean())) < 0.1 * std, name
