"""The optimizer's states, parameter by parameter, whatever ZeRO stage holds them.

Each stage keeps master weights and moments in flat tensors of its own cut, padded and divided among the ranks. Here a
rank's flat tensors are tiles, and a tile knows which elements of which parameters it holds, so that one stage, number
of ranks or recipe can write states that another one reads. References are to deepspeed 0.19.8: s12 =
runtime/zero/stage_1_and_2.py, z3 = runtime/zero/stage3.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpt2ds.training.engine import TrainingEngine

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)

# bitsandbytes' names of the moments, and the elements that share a scale (its optimizers' block size).
EIGHT_BIT_MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}
EIGHT_BIT_BLOCK = 256

# What a dynamic loss scale consists of, in the classes of all stages.
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    """Elements [start, start + length) of a flattened parameter, from `offset` on in the tile that holds them."""

    parameter: str
    start: int
    length: int
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """Master weights that lie in one tensor, and what they are."""

    number: int
    fragments: tuple[Fragment, ...]
    shared: bool
    """Whether every rank has this very tile (ZeRO-0), and only one needs to write it."""


class OptimizerStates:
    """Reads and replaces master weights, moments, Adam's step count and the loss scale of one rank's engine."""

    def __init__(self, engine: TrainingEngine) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        profile = engine.plan.profile
        self._names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self._masters: list[Tensor] = []
        self.tiles: list[Tile] = []
        self._stage_3 = profile.zero_stage == 3
        if self._stage_3:
            self._divide_stage_3()
        elif profile.zero_stage:
            self._divide_flat()
        elif engine.plain:
            for parameter in engine.module.parameters():
                self._add_whole(parameter, parameter)
        else:
            groups = zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
            for parameters, masters in groups:
                for parameter, master in zip(parameters, masters, strict=True):
                    self._add_whole(parameter, master)

    def _parameters(self) -> Iterator[Any]:
        """With the attributes that DeepSpeed has given them."""
        yield from self.engine.module.parameters()

    def _add_whole(self, parameter: Tensor, master: Tensor) -> None:
        fragment = Fragment(parameter=self._names[id(parameter)], start=0, length=parameter.numel(), offset=0)
        self._add(master, [fragment], shared=True)

    def _add(self, master: Tensor, fragments: list[Fragment], *, shared: bool = False) -> None:
        self.tiles.append(Tile(number=len(self.tiles), fragments=tuple(fragments), shared=shared))
        self._masters.append(master)

    def _divide_flat(self) -> None:
        """ZeRO-1 and 2: a flat partition per parameter group; DeepSpeed links each parameter to its piece (s12:824)."""
        name = "fp32_groups_flat_partition"  # of BF16_Optimizer, which is ZeRO-1 in bf16 with fp32 sums
        masters = getattr(self.optimizer, name, None) or self.optimizer.single_partition_of_fp32_groups
        pieces: list[list[Fragment]] = [[] for _ in masters]
        for parameter in self._parameters():
            link = parameter._hp_mapping
            if link is not None:  # else all of it is on other ranks
                pieces[link.param_group_index].append(
                    Fragment(
                        parameter=self._names[id(parameter)],
                        start=link.lp_fragment_address.start,
                        length=link.lp_fragment_address.numel,
                        offset=link.hp_fragment_address.start,
                    )
                )
        for master, fragments in zip(masters, pieces, strict=True):
            self._add(master, fragments)

    def _divide_stage_3(self) -> None:
        """ZeRO-3: each parameter is divided by itself, its last piece padded, and pieces are grouped (z3:1948)."""
        masters = self.optimizer.fp32_partitioned_groups_flat
        pieces: list[list[Fragment]] = [[] for _ in masters]
        for parameter in self._parameters():
            group, offset, share = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            start = share * self.engine.ranks.rank
            length = min(share, parameter.ds_numel - start)
            if length > 0:
                name = self._names[id(parameter)]
                pieces[group].append(Fragment(parameter=name, start=start, length=length, offset=offset))
        for master, fragments in zip(masters, pieces, strict=True):
            self._add(master, fragments)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The type in which each kind of state is written; 8-bit moments are written as the fp32 they stand for."""
        profile = self.engine.plan.profile
        master = torch.bfloat16 if profile.master_bytes == 2 else torch.float32
        moments = torch.bfloat16 if profile.states_dtype == "bf16" else torch.float32
        return {MASTER: master} | dict.fromkeys(MOMENTS, moments)

    @property
    def adam_steps(self) -> int:
        """Steps that Adam has taken, skipped ones not counted; 0 before the first."""
        return max((int(self._state(tile).get("step", 0)) for tile in self.tiles), default=0)

    @property
    def loss_scale(self) -> dict[str, float]:
        """The course of a dynamic loss scale; constants in other types than fp16."""
        scaler = self._scaler
        return {name: getattr(scaler, name) for name in LOSS_SCALE if getattr(scaler, name, None) is not None}

    @contextmanager
    def open(self, tile: Tile) -> Iterator[dict[str, Tensor]]:
        """The tile's states by kind, flat and in place (8-bit moments as an fp32 copy; `quantize` stores those)."""
        with self._in_memory(tile):
            states = {MASTER: self._masters[tile.number].detach().view(-1)}
            for kind in MOMENTS:
                moment = _moment(self._state(tile), kind)
                # Before the first step there are none, which means zero.
                states[kind] = torch.zeros_like(states[MASTER]) if moment is None else moment.view(-1)
            yield states

    @contextmanager
    def _in_memory(self, tile: Tile) -> Iterator[None]:
        """Reads a tile that lies on an NVMe disk, and writes it back at the end."""
        swapped = self._stage_3 and self.optimizer._swappable_optimizer_subgroup(tile.number)
        if swapped:
            self.optimizer._optimizer_states_and_gradient_swap_in(tile.number)
        try:
            yield
        finally:
            if swapped:
                self.optimizer._optimizer_states_and_gradient_swap_out(tile.number)

    def prepare(self) -> None:
        """Lets Adam make its moments, which it does at its first step: one on zero gradients at learning rate 0."""
        if self._stage_3:
            self.optimizer.checkpoint_event_prologue()
        for optimizer in self._bases:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        for tile in self.tiles:
            if _moment(self._state(tile), MOMENTS[0]) is None:
                with self._in_memory(tile):
                    self._step_on_zeros(tile)

    def _step_on_zeros(self, tile: Tile) -> None:
        master = self._masters[tile.number]
        kept, master.grad = master.grad, torch.zeros_like(master)  # offload keeps a buffer there
        if self._stage_3:
            self.optimizer._optimizer_step(tile.number)
        else:
            self._bases[0].step()
        master.grad = kept

    def eight_bits(self, tile: Tile) -> dict[str, Tensor]:
        """8-bit moments as they are, in place: codes and scales; nothing for moments of another kind.

        What they stand for does not become the same codes again: the map has no -1, so a block whose largest element
        is negative would get another scale. Only the same cut of the states can take them over.
        """
        state = self._state(tile)
        numbers = [number for number in EIGHT_BIT_MOMENTS.values() if f"qmap{number}" in state]
        return {f"{part}{number}": state[f"{part}{number}"] for number in numbers for part in ("state", "absmax")}

    def quantize(self, tile: Tile, states: dict[str, Tensor]) -> None:
        """Stores what was written into the fp32 copies that `open` gave of 8-bit moments."""
        state = self._state(tile)
        for kind, number in EIGHT_BIT_MOMENTS.items():
            if f"qmap{number}" in state:
                _quantize(state, number, states[kind])

    def finish(self, adam_steps: int, loss_scale: dict[str, float]) -> None:
        """After all tiles: counters, and the weights in the compute type made anew from the master weights."""
        for state in map(self._state, self.tiles):
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(adam_steps)
            else:
                state["step"] = adam_steps
        for name, value in loss_scale.items():
            if getattr(self._scaler, name, None) is not None:
                setattr(self._scaler, name, value)
        if self._stage_3:
            for tile in self.tiles:
                with self._in_memory(tile):
                    self.optimizer._reassign_or_swap_out_partitioned_parameters(tile.number)
            self.optimizer.checkpoint_event_epilogue()
        elif hasattr(self.optimizer, "update_lp_params"):
            self.optimizer.update_lp_params()
        elif not self.engine.plain:
            for weights, masters in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True):
                for weight, master in zip(weights, masters, strict=True):
                    weight.data.copy_(master.data)

    def _state(self, tile: Tile) -> dict[str, Any]:
        """What Adam keeps of a tile; empty before its first step."""
        master = self._masters[tile.number]
        return next((optimizer.state[master] for optimizer in self._bases if master in optimizer.state), {})

    @property
    def _bases(self) -> list[torch.optim.Optimizer]:
        """The optimizers that step: DeepSpeed's wrappers have one inside, and with part of it offloaded two."""
        if self.engine.plain:
            return [self.optimizer]
        inside = (self.optimizer.optimizer, getattr(self.optimizer, "backup_optimizer", None))
        return [optimizer for optimizer in inside if optimizer is not None]

    @property
    def _scaler(self) -> Any:
        unfused = getattr(self.optimizer, "loss_scale_config", None)  # ZeRO-0 in 16 bits
        return unfused or getattr(self.optimizer, "loss_scaler", None)


def _moment(state: dict[str, Any], kind: str) -> Tensor | None:
    number = EIGHT_BIT_MOMENTS[kind]
    if f"qmap{number}" in state:
        from bitsandbytes.functional import dequantize_blockwise

        moment: Tensor = dequantize_blockwise(
            state[f"state{number}"],
            absmax=state[f"absmax{number}"],
            code=state[f"qmap{number}"],
            blocksize=EIGHT_BIT_BLOCK,
        )
        return moment
    # bitsandbytes leaves small tensors in fp32 under its own names.
    found: Tensor | None = state.get(kind, state.get(f"state{number}"))
    return found


def _quantize(state: dict[str, Any], number: str, moment: Tensor) -> None:
    from bitsandbytes.functional import quantize_blockwise

    shape = state[f"state{number}"].shape
    quantized, scales = quantize_blockwise(moment.view(shape), code=state[f"qmap{number}"], blocksize=EIGHT_BIT_BLOCK)
    state[f"state{number}"].copy_(quantized.view(shape))
    state[f"absmax{number}"].copy_(scales.absmax)
