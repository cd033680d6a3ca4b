"""The state of a training run as plain tensors and JSON: the same files whichever engine trains.

Under DDP every rank holds all of it, under ZeRO and FSDP a shard. It is gathered to full tensors by name, so a
checkpoint does not depend on how weights and moments were sharded:

    model.safetensors       the weights that train, in the precision they are trained in
    optimizer.safetensors   `<state>.<parameter>`, such as exp_avg.transformer.cross_attn.0.mlp.c_fc.weight
    training_state.json     learning rates, scheduler, loss scaler, and of each rank random numbers and running loss
    trainer_state.json      transformers' own: step, epoch, best metric, log history
"""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dssk.checkpoint import WEIGHTS_FILE
from dssk.models.weights import is_cross_attn
from dssk.utils.files import content_of
from dssk.utils.json_files import read_json

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "training_state.json"
TRAINER_STATE_FILE = "trainer_state.json"
LOW_BITS = 0xFFFF  # of a number in fp32, those that bfloat16 lacks

Tensors = dict[str, torch.Tensor]


# --- gathering (on all ranks together) --------------------------------------------------------------------------


def gather_weights(trainer: Any) -> Tensors:
    """The weights that train, whole, on the CPU; with what a merged reader keeps beside them."""
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_fp32_param as whole
    else:
        whole = _whole
    weights = {name: _host(whole(p)) for name, p in trained_parameters(trainer)}
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = ((name, b) for name, b in model.named_buffers() if is_cross_attn(name) and name in persistent)
    return weights | {name: _host(_whole(buffer)) for name, buffer in buffers}


def gather_optimizer(trainer: Any) -> Tensors:
    """The full optimizer state of each parameter, on the CPU."""
    tensors: Tensors = {}
    if trainer.is_deepspeed_enabled:
        _link_zero_state(trainer.model_wrapped.optimizer)
    for name, parameter in trained_parameters(trainer):
        for key, value in _parameter_state(trainer, parameter):
            tensors[f"{key}.{name}"] = _smallest(_host(value))
    return tensors


def _smallest(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in bfloat16 if that loses nothing."""
    half = tensor.to(torch.bfloat16)
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor


class MomentRounding:
    """Rounds AdamW's moments to bfloat16 after each step, stochastically: checkpoints are a third smaller, and exact.

    bfloat16 has 8 bits. To the nearest, a change of a moment by less than 1/512 of it, as with beta2 = 0.998, would
    always be lost, and the moment stand still; a value is rounded up or down in proportion to what it is nearer to,
    so the expected moment is the exact one. The noise is decided by seed and step alone: a run that is resumed draws
    the same. One vector of it serves all weights of a step, so their roundings are not independent of each other.
    """

    def __init__(self, seed: int):
        self.seed = seed

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, *step_arguments: Any) -> None:
        states = [state for state in optimizer.state.values() if state]
        moments = [[_local(t) for t in state.values() if torch.is_tensor(t) and t.dim()] for state in states]
        if not moments:
            return
        noise = self._noise(int(states[0]["step"]), max(m[0].numel() for m in moments), moments[0][0].device)
        for first, second in moments:
            bits = noise[: first.numel()].view(first.shape)
            _round_stochastically(first, bits & LOW_BITS)
            _round_stochastically(second, (bits >> 16) & LOW_BITS)

    def _noise(self, step: int, count: int, device: torch.device) -> torch.Tensor:
        """`count` random 32-bit numbers, as int32."""
        # Hashed, as a CPU's generator takes only 32 bits of its seed.
        mixed = xxhash.xxh3_64_intdigest(f"{self.seed} {step}".encode()) >> 1
        generator = torch.Generator(device).manual_seed(mixed)
        return torch.randint(-(2**31), 2**31, (count,), generator=generator, device=device, dtype=torch.int32)


def _round_stochastically(values: torch.Tensor, noise: torch.Tensor) -> None:
    """Round fp32 values to bfloat16 in place; `noise` is uniform in 0 .. 2^16 - 1, the bits that bfloat16 lacks."""
    bits = values.view(torch.int32)
    bits.add_(noise).bitwise_and_(~LOW_BITS)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's piece of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_run_state(trainer: Any) -> dict[str, Any]:
    """Everything else that decides how training goes on, as JSON values."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    budget = trainer.budget
    used = {"cpu_seconds": round(budget.used, 3)} if budget.limit is not None or budget.before else {}
    return used | {
        "learning_rates": [group["lr"] for group in trainer.optimizer.param_groups],
        "scheduler": trainer.lr_scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else _zero_scaler(trainer),
        "last_logged_step": trainer._globalstep_last_logged,
        "evaluation_due": trainer.evaluation_due,
        "ranks": gather_object([{"loss_sum": trainer._tr_loss.item(), "random": random_state()}]),
    }


# --- restoring (on all ranks together) --------------------------------------------------------------------------


def restore(trainer: Any, folder: Path) -> None:
    """Put weights, optimizer, scheduler and scaler of a checkpoint into a trainer whose model is wrapped already."""
    with content_of(folder, "take an older checkpoint, or start afresh with -r 1"):
        _restore(trainer, folder)


def _restore(trainer: Any, folder: Path) -> None:
    weights = load_file(folder / WEIGHTS_FILE)
    moments = {name: tensor.float() for name, tensor in load_file(folder / OPTIMIZER_FILE).items()}
    _restore_weights(trainer, weights)
    _restore_optimizer(trainer, moments)
    saved = load_run_state(folder)
    rates = [*saved["learning_rates"], *saved["scheduler"].get("base_lrs", ())]
    if not all(isinstance(rate, int | float) and math.isfinite(rate) for rate in rates):
        raise ValueError(f"learning rates are {rates}")
    for group, rate in zip(trainer.optimizer.param_groups, saved["learning_rates"], strict=True):
        group["lr"] = rate
    trainer.lr_scheduler.load_state_dict(saved["scheduler"])
    trainer.evaluation_due = saved["evaluation_due"]
    trainer.budget.before = saved.get("cpu_seconds", 0.0)  # of a run that minutes end
    scaler = getattr(trainer.accelerator, "scaler", None)
    if saved["scaler"] is not None and scaler is not None:
        scaler.load_state_dict(saved["scaler"])
    elif saved["scaler"] is not None and trainer.is_deepspeed_enabled:
        vars(trainer.model_wrapped.optimizer.loss_scaler).update(saved["scaler"])


def load_run_state(folder: Path) -> dict[str, Any]:
    return read_json(folder / STATE_FILE, dict)


def load_trainer_state(folder: Path) -> dict[str, Any]:
    """transformers' own state: step, best evaluation, log history."""
    return read_json(folder / TRAINER_STATE_FILE, dict)


def restore_rank(trainer: Any, folder: Path) -> None:
    """Put back this rank's random numbers and running loss."""
    with content_of(folder / STATE_FILE, "take an older checkpoint, or start afresh with -r 1"):
        _restore_rank(trainer, folder)


def _restore_rank(trainer: Any, folder: Path) -> None:
    saved = load_run_state(folder)
    ranks, me = saved["ranks"], trainer.args.process_index
    if len(ranks) == trainer.args.world_size:
        set_random_state(ranks[me]["random"])
        loss_sum = ranks[me]["loss_sum"]
    else:  # with other ranks only their mean has a meaning
        torch.manual_seed(hash((trainer.args.seed, trainer.state.global_step, me)) % 2**63)
        loss_sum = sum(rank["loss_sum"] for rank in ranks) / len(ranks)
    trainer._tr_loss.fill_(loss_sum)
    trainer._globalstep_last_logged = saved["last_logged_step"]


def random_state() -> dict[str, Any]:
    """The states of all random generators of this process, as JSON values."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(state) for state in cuda],
    }


def set_random_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_unhex(state["torch"]))
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_unhex(text) for text in state["cuda"]])


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _unhex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


# --- the engines ------------------------------------------------------------------------------------------------


def trained_parameters(trainer: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of all that trains, in one order on all ranks."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").contiguous()


def _inner_optimizer(trainer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch (or of DeepSpeed on the CPU) below the wrappers."""
    if trainer.is_deepspeed_enabled:
        return trainer.model_wrapped.optimizer.optimizer
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def _parameter_state(trainer: Any, parameter: nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
    if not trainer.is_deepspeed_enabled:
        for key, value in _inner_optimizer(trainer).state.get(parameter, {}).items():
            yield key, _whole(value)
        return
    from deepspeed.utils import safe_get_full_optimizer_state

    states = list(_inner_optimizer(trainer).state.values())
    if not states:
        return
    for key, value in states[0].items():  # a flat piece of all parameters; what is no such piece is a counter
        if torch.is_tensor(value) and value.dim() > 0:
            yield key, safe_get_full_optimizer_state(parameter, key)
        else:
            yield key, torch.as_tensor(value, dtype=torch.float32).clone()


def _restore_weights(trainer: Any, weights: Tensors) -> None:
    with torch.no_grad():
        for name, parameter in trained_parameters(trainer):
            _set_weight(trainer, parameter, weights[name])
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        for name, buffer in model.named_buffers():
            if name in weights:
                buffer.copy_(_laid_out_like(weights[name], buffer))


def _set_weight(trainer: Any, parameter: nn.Parameter, value: torch.Tensor) -> None:
    if not trainer.is_deepspeed_enabled:
        parameter.copy_(_laid_out_like(value, parameter))
        return
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
        parameter.copy_(value)
    if _is_zero3(parameter):
        safe_set_local_fp32_param(parameter, _zero3_piece(value, parameter))
    else:
        safe_set_full_fp32_param(parameter, value.to(parameter.device))


def _restore_optimizer(trainer: Any, moments: Tensors) -> None:
    if not moments:  # saved before the first step
        return
    if trainer.is_deepspeed_enabled:
        _create_zero_state(trainer, moments)
    for name, parameter in trained_parameters(trainer):
        state = {key: moments[f"{key}.{name}"] for key in _keys_of(moments, name)}
        if trainer.is_deepspeed_enabled:
            _set_zero_state(parameter, state)
        else:
            _set_state(_inner_optimizer(trainer), parameter, state)


def _set_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: Tensors) -> None:
    (group,) = (g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    counter_device = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
    optimizer.state[parameter] = {
        key: _laid_out_like(value, parameter) if value.dim() else value.to(counter_device)
        for key, value in state.items()
    }


def _laid_out_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device of `parameter`, and cut into shards as it is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def _keys_of(moments: Tensors, name: str) -> list[str]:
    return [key.removesuffix(f".{name}") for key in moments if key.endswith(f".{name}")]


# --- DeepSpeed's ZeRO: it optimizes flat pieces of all parameters -------------------------------------------------


def _is_zero3(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _create_zero_state(trainer: Any, moments: Tensors) -> None:
    """Give the flat pieces their state, which torch creates only in the first step."""
    zero = trainer.model_wrapped.optimizer
    stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    first, _ = next(trained_parameters(trainer))
    for piece in zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups:
        for key in _keys_of(moments, first):
            value = moments[f"{key}.{first}"]
            zero.optimizer.state[piece][key] = torch.zeros_like(piece) if value.dim() else value.clone()
    _link_zero_state(zero)


def _link_zero_state(zero: Any) -> None:
    """Let ZeRO 1 and 2 look up where each parameter's moments lie.

    DeepSpeed 0.19.8 does so once, when only the first parameter group has been stepped, and misses the others.
    """
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _set_zero_state(parameter: nn.Parameter, state: Tensors) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    for key, value in state.items():
        if value.dim() and _is_zero3(parameter):
            safe_set_local_optimizer_state(parameter, _zero3_piece(value, parameter), key)
        elif value.dim():
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def _zero3_piece(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """This rank's piece of a whole tensor; the last rank's is padded."""
    size, ranks = parameter.partition_numel(), torch.distributed.get_world_size()
    padded = nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))
    return padded.narrow(0, size * torch.distributed.get_rank(), size).to(parameter.device)


def _zero_scaler(trainer: Any) -> dict[str, Any] | None:
    """The numbers of DeepSpeed's own loss scaler, in fp16."""
    if not trainer.is_deepspeed_enabled:
        return None
    scaler = getattr(trainer.model_wrapped.optimizer, "loss_scaler", None)
    return scaler and {k: v for k, v in vars(scaler).items() if isinstance(v, bool | int | float)}
