"""One rank: builds a GPT-2 under DeepSpeed's zero.Init and checks that the initial weights are GPT-2's all the same."""

import deepspeed
import torch
import torch._dynamo  # before zero.Init: its first import inside fails
from gpt2.initial import check_initial

from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.gpt2.model import GPT2
from gpt2ds.training.engine import start_ranks, stop_ranks

start_ranks("cpu")
config = GPT2Config(name="wide", emb_dim=128, n_heads=2, n_layers=12, context_length=256, vocab_size=4096)
torch.manual_seed(0)
ds_config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
with deepspeed.zero.Init(config_dict_or_path=ds_config):
    model = GPT2(config)
assert all(parameter.ds_shape != parameter.shape for parameter in model.parameters()), "nothing was partitioned"
for name, parameter in model.named_parameters():
    with deepspeed.zero.GatheredParameters([parameter]):
        check_initial(name, parameter.detach().clone())
stop_ranks()
