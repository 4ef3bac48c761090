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
QUANTIZED_AT_A_TIME = 2**24

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
        """The course of a dynamic loss scale; nothing where it is fixed, or there is none."""
        scaler = self._scaler
        if not _is_dynamic(scaler):
            return {}
        return {name: getattr(scaler, name) for name in LOSS_SCALE if getattr(scaler, name, None) is not None}

    @contextmanager
    def open(self, tile: Tile) -> Iterator[None]:
        """While entered, the tile is in memory: one that lies on an NVMe disk is read, and written back at the end."""
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
        self.engine.set_rate(0.0)
        for tile in self.tiles:
            if not self._state(tile):
                with self.open(tile):
                    self._step_on_zeros(tile)

    def _step_on_zeros(self, tile: Tile) -> None:
        master = self._masters[tile.number]
        kept, master.grad = master.grad, torch.zeros_like(master)  # offload keeps a buffer there
        if self._stage_3:
            self.optimizer._optimizer_step(tile.number)
        else:
            self.engine.stepping_optimizers[0].step()
        master.grad = kept

    def piece(self, tile: Tile, kind: str, fragment: Fragment) -> Tensor:
        """A fragment's states, flat and in place; but moments in 8 bits are the fp32 numbers they stand for, and before
        Adam's first step moments are zeros that nothing holds.
        """
        master = self._masters[tile.number].detach().view(-1)
        if kind == MASTER:
            return master.narrow(0, fragment.offset, fragment.length)
        state, number = self._state(tile), EIGHT_BIT_MOMENTS[kind]
        if f"qmap{number}" in state:
            # No more than the fragment: a whole tile in fp32 may be what the 8 bits were to save.
            return _dequantized(state, number, fragment.offset, fragment.length)
        # bitsandbytes leaves small tensors in fp32 under its own names.
        moment: Tensor | None = state.get(kind, state.get(f"state{number}"))
        if moment is None:
            return torch.zeros(fragment.length, dtype=self.dtypes[kind])
        return moment.view(-1).narrow(0, fragment.offset, fragment.length)

    def eight_bits(self, tile: Tile) -> dict[str, Tensor]:
        """8-bit moments as they are, in place: codes and scales; nothing for moments of another kind.

        What they stand for does not become the same codes again: the map has no -1, so a block whose largest element
        is negative would get another scale. Only the same cut of the states can take them over.
        """
        state = self._state(tile)
        numbers = [number for number in EIGHT_BIT_MOMENTS.values() if f"qmap{number}" in state]
        return {f"{part}{number}": state[f"{part}{number}"] for number in numbers for part in ("state", "absmax")}

    def empty(self, tile: Tile) -> Tensor:
        """Zeros on the host, as many as the tile has elements."""
        return torch.zeros(self._masters[tile.number].numel())

    def quantize(self, tile: Tile, kind: str, moment: Tensor) -> None:
        """Replaces an 8-bit moment by what these numbers, of the whole tile, become in 8 bits."""
        from bitsandbytes.functional import quantize_blockwise

        state, number = self._state(tile), EIGHT_BIT_MOMENTS[kind]
        codes, scales = state[f"state{number}"].view(-1), state[f"absmax{number}"].view(-1)
        for start in range(0, len(moment), QUANTIZED_AT_A_TIME):
            part = moment[start : start + QUANTIZED_AT_A_TIME].to(codes.device)
            quantized, found = quantize_blockwise(part, code=state[f"qmap{number}"], blocksize=EIGHT_BIT_BLOCK)
            codes[start : start + len(part)].copy_(quantized.view(-1))
            scales[start // EIGHT_BIT_BLOCK :][: len(found.absmax)].copy_(found.absmax)

    def finish(self, adam_steps: int, loss_scale: dict[str, float]) -> None:
        """After all tiles: counters, and the weights in the compute type made anew from the master weights."""
        for state in map(self._state, self.tiles):
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(adam_steps)
            else:
                state["step"] = adam_steps
        if _is_dynamic(self._scaler):
            for name in LOSS_SCALE:
                if name in loss_scale and getattr(self._scaler, name, None) is not None:
                    setattr(self._scaler, name, loss_scale[name])
        if self._stage_3:
            for tile in self.tiles:
                with self.open(tile):
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
        optimizers = self.engine.stepping_optimizers
        return next((optimizer.state[master] for optimizer in optimizers if master in optimizer.state), {})

    @property
    def _scaler(self) -> Any:
        unfused = getattr(self.optimizer, "loss_scale_config", None)  # ZeRO-0 in 16 bits
        return unfused or getattr(self.optimizer, "loss_scaler", None)


def _is_dynamic(scaler: Any) -> bool:
    return bool(getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False)))


def _dequantized(state: dict[str, Any], number: str, offset: int, length: int) -> Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    first, last = offset // EIGHT_BIT_BLOCK, -(-(offset + length) // EIGHT_BIT_BLOCK)
    codes: Tensor = state[f"state{number}"].view(-1)[first * EIGHT_BIT_BLOCK : last * EIGHT_BIT_BLOCK]
    whole: Tensor = dequantize_blockwise(
        codes.contiguous(),
        absmax=state[f"absmax{number}"].view(-1)[first:last],
        code=state[f"qmap{number}"],
        blocksize=EIGHT_BIT_BLOCK,
    )
    return whole.view(-1).narrow(0, offset - first * EIGHT_BIT_BLOCK, length)
