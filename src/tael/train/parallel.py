"""Many processes: torch's own tools applied to the single-device model from outside, in one readable order.

    torchrun --nproc-per-node N -m tael run RECIPE        N processes here; more machines as torchrun says

`Parallel.start` joins the process group that torchrun describes; `shard` lays the parameters of every block over a
one-dimensional DeviceMesh with `fully_shard` (ZeRO-3: parameters, gradients and optimiser state live in shards).
Model files know nothing of ranks. Without torchrun everything here is a no-op.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from tael.errors import TaelError
from tael.model.moe import Router
from tael.model.transformer import Transformer


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA when there is one, then Apple's MPS, else the CPU; raises TaelError for one not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TaelError(f"device '{name}' is not a device; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TaelError(f'device \'{name}\': torch finds no CUDA GPU here; use device = "auto" or "cpu"')
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise TaelError(f'device \'{name}\': torch finds no Apple GPU here; use device = "auto" or "cpu"')
    return device


@dataclass(frozen=True)
class Parallel:
    """This process among `world_size`; `mesh` is None when there is only one."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None

    @classmethod
    def start(cls, device: torch.device) -> Parallel:
        """Join the process group torchrun set up; a plain process stays alone."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls(device)
        if not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
        return cls(device, dist.get_rank(), world_size, mesh)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, model: Transformer, dtype: torch.dtype) -> Transformer:
        """Shard every block, then the rest; compute in `dtype`, reduce gradients in fp32, routers all in fp32."""
        if self.mesh is None:
            return model
        # Inputs keep their precision: RoPE's angles are fp32 whatever the parameters are.
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        high = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
        for module in model.modules():
            if isinstance(module, Router):
                fully_shard(module, mesh=self.mesh, mp_policy=high)
        for block in [*model.layers, *(module.block for module in model.mtp)]:
            fully_shard(block, mesh=self.mesh, mp_policy=policy)  # type: ignore[arg-type]
        fully_shard(model, mesh=self.mesh, mp_policy=policy)
        for name in ("features", "mtp_features", "logits"):
            register_fsdp_forward_method(model, name)
        return model

    def gather(self, model: Transformer) -> Transformer:
        """A whole fp32 copy of a sharded model, on CPU in the main process; the model itself if not sharded."""
        if self.mesh is None:
            return model
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        whole = Transformer(model.config)
        if self.is_main:
            whole.load_state_dict(state)
        return whole

    def sum(self, value: Tensor) -> Tensor:
        """Sum of `value` over all processes, in place."""
        if self.mesh is not None:
            dist.all_reduce(value)
        return value

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums of plain numbers over all processes."""
        if self.mesh is None:
            return list(values)
        return self.sum(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.mesh is not None:
            dist.barrier()

    def finish(self) -> None:
        """Leave the process group, once no trainer is in use any more, and end its threads.

        A thread of gloo that lets go of a tensor while Python shuts down aborts the process, after all the work is
        done (pytorch issue 190489). Threads end with the last reference to the group: models keep it in cycles, the
        mesh in a registry of its own (in torch 2.13), and cached shardings keep the mesh.
        """
        if self.mesh is not None and dist.is_initialized():
            dist.destroy_process_group()
            getattr(self.mesh, "_pg_registry", {}).clear()
            gc.collect()
