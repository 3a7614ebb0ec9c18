"""Tensor parallelism of a squared-ReLU FFN, for ``torch.distributed.tensor.parallel.parallelize_module``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

import srelu24.ops.sharding  # noqa: F401 (registers the rules)
from srelu24.nn.modules import SquaredReLUFFN
from srelu24_gen.errors import Unsupported


class SquaredReLUFFNParallel(ParallelStyle):
    """Shards a :class:`SquaredReLUFFN` along F: W1 and b1 by rows, W2 by columns, b2 on every rank.

    The packed activations never leave their rank; one all-reduce (or reduce-scatter) ends the layer. The styles for
    two separate linear layers (``ColwiseParallel``, ``RowwiseParallel``) work as well, but then the FFN runs dense.

        parallelize_module(model, mesh, {"layers.*.mlp": SquaredReLUFFNParallel()})

    Args:
        input_layouts: how x lies on the ranks, as a plain tensor or a DTensor; ``Shard(1)`` for sequence parallelism.
        output_layouts: how y is wanted.
        use_local_output: y as a plain tensor.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = (input_layouts or Replicate(),)
        self.output_layouts = (output_layouts or Replicate(),)
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, SquaredReLUFFN):
            raise Unsupported(
                f"{type(module).__name__} is no SquaredReLUFFN; call srelu24.convert(model) before parallelize_module."
            )
        if module.recipe is not None:
            raise Unsupported("the FFN has a recipe, and none runs tensor parallel; set_recipe(None) first.")
        f, ranks = int(module.up.out_features), device_mesh.size()  # type: ignore[arg-type]
        if f % (8 * ranks):
            raise Unsupported(f"d_ff is {f} on {ranks} ranks; each needs a multiple of 8, so that groups stay whole.")
        shards = {module.names[0]: (Shard(0), Shard(0)), module.names[1]: (Shard(1), Replicate())}

        def partition(name: str, part: nn.Module, mesh: DeviceMesh) -> None:
            if name not in shards:
                return
            for key, placement in zip(("weight", "bias"), shards[name], strict=True):
                parameter = getattr(part, key)
                if parameter is not None:
                    spread = distribute_tensor(parameter, mesh, [placement], src_data_rank=self.src_data_rank)
                    setattr(part, key, nn.Parameter(spread, requires_grad=parameter.requires_grad))

        def spread_input(ffn: SquaredReLUFFN, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = ffn.input_of(args, kwargs)
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, device_mesh, self.input_layouts, run_check=False)
            return (x.redistribute(placements=(Replicate(),)),), {}

        def collect_output(_: nn.Module, y: DTensor, mesh: DeviceMesh) -> Tensor:
            y = y.redistribute(placements=self.output_layouts)
            return y.to_local() if self.use_local_output else y

        # Not by distribute_module's input_fn, which sees no keyword arguments.
        module.register_forward_pre_hook(spread_input, with_kwargs=True)
        return distribute_module(module, device_mesh, partition, output_fn=collect_output)  # type: ignore[arg-type]
