"""One of two processes: runs every case of test_distributed.py and leaves what it found, by the name of the case.

python distributed_worker.py RANK RANKS FOLDER DEVICE
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import srelu24
from srelu24.nn.modules import SquaredReLUFFN
from srelu24_gen.errors import Unsupported

D, F = 32, 512


class Block(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(D), SquaredReLUFFN(D, F, bias, mode="sparse")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def model(device: str, bias: bool = True) -> nn.Module:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(Block(bias), Block(bias)).bfloat16().to(device).eval()


def tokens(device: str, rows: int = 128) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, D).bfloat16().to(device)


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    net(x).float().square().mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in net.named_parameters()}


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --------------------------------------------------------------------------------------------- what is compared


def ddp(mesh: DeviceMesh, device: str) -> float:
    mine = tokens(device).chunk(mesh.size())[mesh.get_local_rank()]
    with torch.no_grad():
        pruned = distance(DistributedDataParallel(model(device))(mine), model(device)(mine))
    ours = gradients(DistributedDataParallel(model(device)), mine)
    alone = gradients(model(device), tokens(device))
    return max(pruned, *(distance(ours[name], alone[name]) for name in alone))


def fsdp2(mesh: DeviceMesh, device: str) -> float:
    def sharded() -> nn.Module:
        net = model(device)
        for block in net:
            fully_shard(block, mesh=mesh)
        return fully_shard(net, mesh=mesh)

    mine = tokens(device).chunk(mesh.size())[mesh.get_local_rank()]
    with torch.no_grad():
        pruned = distance(sharded()(mine), model(device)(mine))
    ours = gradients(sharded(), mine)
    alone = gradients(model(device), tokens(device))
    return max(pruned, *(distance(full(ours[name]), alone[name]) for name in alone))


def fsdp2_of_the_ffn(mesh: DeviceMesh, device: str) -> float:
    net = model(device)
    for block in net:
        fully_shard(block.mlp, mesh=mesh)
    with torch.no_grad():
        return distance(net(tokens(device)), model(device)(tokens(device)))


def runs_in_inference_mode(mesh: DeviceMesh, device: str) -> bool:
    """Whether this PyTorch's own FSDP2 does. That of 2.11 asks gathered weights for a version, which they lack."""
    layer = nn.Linear(8, 8, device=device)
    fully_shard(layer, mesh=mesh)
    try:
        with torch.inference_mode():
            layer(torch.ones(1, 8, device=device))
    except RuntimeError as error:
        return "version counter" not in str(error)
    return True


def fsdp2_of_the_linears(mesh: DeviceMesh, device: str) -> float:
    """The pruned numbers, while each Linear's weight is only there while it runs; gradients as before."""

    def sharded(recipe: srelu24.Recipe | None = None) -> nn.Module:
        net = model(device)
        if recipe is not None:
            for block in net:
                block.mlp.mode = "auto"
            srelu24.convert(net, recipe=recipe)
        for block in net:
            fully_shard(block.mlp.up, mesh=mesh)
            fully_shard(block.mlp.down, mesh=mesh)
        return net

    x = tokens(device)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", srelu24.FallbackWarning)
        found = [float(not torch.equal(sharded()(x), model(device)(x)))]
    if runs_in_inference_mode(mesh, device):
        with torch.inference_mode():
            found.append(distance(sharded()(x), model(device)(x)))
    ours, alone = gradients(sharded(), x), gradients(model(device), x)
    found += [distance(full(ours[name]), alone[name]) for name in alone]
    net = sharded(srelu24.Recipe(warmup_steps=0))
    with pytest.warns(srelu24.FallbackWarning, match=r"0\.mlp: FSDP shards its up_proj by itself"):
        ours = gradients(net, x)
    found += [distance(full(ours[name]), alone[name]) for name in alone]
    net[0].mlp.strict = True
    with pytest.raises(Unsupported, match=r"0\.mlp cannot run pruned, and strict is set: FSDP shards"):
        net(x)
    return max(found)


def fsdp2_recipe_state(mesh: DeviceMesh, device: str) -> float:
    """A sharded model on the meta device takes a checkpoint by assign, with the recipe's state and without."""
    net, recipe = converted_by_recipe(device)
    recipe.step()
    for with_state in (True, False):
        state = net.state_dict() if with_state else model(device).float().state_dict()
        with torch.device("meta"):
            fresh = nn.Sequential(Block(True), Block(True)).eval()
        for block in fresh:
            block.mlp.mode = "auto"
        again = srelu24.Recipe(warmup_steps=0, dense_features=1.0)
        srelu24.convert(fresh, recipe=again)
        for block in fresh:
            fully_shard(block, mesh=mesh)
        target = fresh.state_dict()
        spread = {
            name: distribute_tensor(value, mesh, target[name].placements)
            if isinstance(target[name], DTensor)
            else value.clone()
            for name, value in state.items()
        }
        fresh.load_state_dict(spread, assign=True)
        x = tokens(device).float()
        with torch.no_grad():
            assert distance(fresh(x), net(x)) < 1e-5
        assert again.steps == int(with_state)
        fresh(x).square().mean().backward()
        assert not any(buffer.is_meta for buffer in fresh.buffers())
    return 0.0


def profiles(mesh: DeviceMesh, device: str) -> float:
    """The shares of a single process: of FFNs that are spread along F, in every way, converted or not."""
    x = tokens(device)
    wanted = srelu24.profile(model(device), x, gpu="h200").layers
    plan = {"*.mlp.up_proj": ColwiseParallel(), "*.mlp.down_proj": RowwiseParallel()}
    plain = nn.Sequential(*(PlainBlock(block) for block in model(device)))
    found = [
        parallelize_module(model(device), mesh, {"*.mlp": srelu24.SquaredReLUFFNParallel()}),
        parallelize_module(plain, mesh, plan),
    ]
    sharded = model(device)
    for block in sharded:
        fully_shard(block, mesh=mesh)
    worst = 0.0
    for net in (*found, sharded):
        layers = srelu24.profile(net, x, gpu="h200").layers
        assert [layer.tokens for layer in layers] == [len(x)] * 2, layers
        assert [layer.d_ff for layer in layers] == [F] * 2
        for ours, alone in zip(layers, wanted, strict=True):
            worst = max(worst, abs(ours.density - alone.density), abs(ours.energy_dropped - alone.energy_dropped))
        assert len(srelu24.status(net, 128)) == 2
    return worst


class PlainBlock(nn.Module):
    """A block as a model's author writes it, of the same layers."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm, self.mlp = block.norm, PlainMLP(block.mlp)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class PlainMLP(nn.Module):
    def __init__(self, ffn: SquaredReLUFFN) -> None:
        super().__init__()
        self.up_proj, self.down_proj = ffn.up, ffn.down

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x).relu().square())


def tensor_parallel(mesh: DeviceMesh, device: str) -> float:
    found = []
    for bias in (False, True):
        net = parallelize_module(model(device, bias), mesh, {"*.mlp": srelu24.SquaredReLUFFNParallel()})
        local = net[0].mlp.up.weight.to_local()
        assert local.shape == (F // mesh.size(), D), local.shape
        with torch.no_grad():
            found.append(distance(net(tokens(device)), model(device, bias)(tokens(device))))
        ours, alone = gradients(net, tokens(device)), gradients(model(device, bias), tokens(device))
        found += [distance(full(ours[name]), alone[name]) for name in alone]
    return max(found)


def tensor_parallel_collectives(mesh: DeviceMesh, device: str) -> float:
    """One all-reduce of Y, and nothing else, crosses the ranks: S stays where it is."""
    from torch.distributed.tensor.debug import CommDebugMode

    net = parallelize_module(model(device, False)[0].mlp, mesh, srelu24.SquaredReLUFFNParallel())
    with torch.no_grad(), CommDebugMode() as seen:
        net(x=tokens(device))
    counts = {str(op).rsplit(".", 1)[-1]: n for op, n in seen.get_comm_counts().items()}
    assert counts == {"all_reduce": 1} or mesh.size() == 1, counts
    return 0.0


def sequence_parallel(mesh: DeviceMesh, device: str) -> float:
    style = srelu24.SquaredReLUFFNParallel(input_layouts=Shard(0), output_layouts=Shard(0))
    ffn = parallelize_module(model(device)[0].mlp, mesh, style)
    rank = mesh.get_local_rank()
    with torch.no_grad():
        whole = model(device)[0].mlp(tokens(device))
        return distance(ffn(tokens(device).chunk(mesh.size())[rank]), whole.chunk(mesh.size())[rank])


def styles_of_the_layers(mesh: DeviceMesh, device: str) -> float:
    plan = {"*.mlp.up_proj": ColwiseParallel(), "*.mlp.down_proj": RowwiseParallel()}
    net = parallelize_module(model(device), mesh, plan)
    x = tokens(device)
    with torch.no_grad(), pytest.raises(Unsupported, match="up_proj changes what goes in or comes out"):
        net(x)  # the blocks' mode is sparse
    for block in net:
        block.mlp.mode = "auto"
    with torch.no_grad(), pytest.warns(srelu24.FallbackWarning, match="up_proj changes"):
        found = net(x)
    return distance(found, model(device)(x.requires_grad_()).detach())  # recorded, so dense


def converted_by_recipe(device: str) -> tuple[nn.Module, srelu24.Recipe]:
    net = model(device).float()
    for block in net:
        block.mlp.mode = "auto"
    recipe = srelu24.Recipe(warmup_steps=0, dense_features=1.0)  # ranks prune along their own tokens, so none do
    assert len(srelu24.convert(net, recipe=recipe).converted) == 2
    return net, recipe


def recipe_ddp(mesh: DeviceMesh, device: str) -> float:
    mine = tokens(device).float().chunk(mesh.size())[mesh.get_local_rank()]
    net, recipe = converted_by_recipe(device)
    ours = gradients(DistributedDataParallel(net), mine)
    assert [int(state.rows) for state in recipe.layers.values()] == [len(mine)] * 2
    alone = gradients(converted_by_recipe(device)[0], tokens(device).float())
    return max(distance(ours[name], alone[name]) for name in alone)


def recipe_fsdp2(mesh: DeviceMesh, device: str) -> float:
    mine = tokens(device).float().chunk(mesh.size())[mesh.get_local_rank()]
    net, recipe = converted_by_recipe(device)
    for block in net:
        fully_shard(block, mesh=mesh)
    ours = gradients(fully_shard(net, mesh=mesh), mine)
    assert [int(state.rows) for state in recipe.layers.values()] == [len(mine)] * 2
    alone = gradients(converted_by_recipe(device)[0], tokens(device).float())
    return max(distance(full(ours[name]), alone[name]) for name in alone)


def refused_recipes(mesh: DeviceMesh, device: str) -> float:
    x = tokens(device)
    for recipe in (srelu24.Recipe(), "rowwise"):
        ffn = SquaredReLUFFN(D, F, recipe=recipe, dtype=torch.bfloat16, device=device)
        with pytest.raises(Unsupported, match="none runs tensor parallel"):
            parallelize_module(ffn, mesh, srelu24.SquaredReLUFFNParallel())
        parallelize_module(ffn, mesh, {"up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()})
        ffn.up._forward_pre_hooks.clear()  # the styles' hooks would make it dense
        ffn.up._forward_hooks.clear()
        ffn.down._forward_pre_hooks.clear()
        ffn.down._forward_hooks.clear()
        with pytest.raises(Unsupported, match="a recipe does not run on DTensors"):
            ffn(x)
    ffn = SquaredReLUFFN(D, F, recipe="rowwise", dtype=torch.bfloat16, device=device)
    fully_shard(ffn, mesh=mesh)
    with pytest.raises(Unsupported, match="FSDP manages the weights of an FFN with an 8-bit recipe"), torch.no_grad():
        ffn(x)
    ffn = SquaredReLUFFN(D, F, dtype=torch.bfloat16, device=device)
    fully_shard(ffn, mesh=mesh)
    with pytest.raises(Unsupported, match="FSDP manages the weights of an FFN with an 8-bit recipe"):
        ffn.set_recipe("static")
    return 0.0


def refused_widths(mesh: DeviceMesh, device: str) -> float:
    for module, words in ((SquaredReLUFFN(D, 12 * mesh.size()), "multiple of 8"), (nn.Linear(8, 8), "convert")):
        with pytest.raises(Unsupported, match=words):
            parallelize_module(module, mesh, srelu24.SquaredReLUFFNParallel())
    return 0.0


def dtensor_ops(mesh: DeviceMesh, device: str) -> float:
    """Every op on rows or columns spread over the ranks, against the op on one."""
    x, residual = tokens(device), tokens(device).flip(0)
    w1 = torch.randn(F, D, generator=torch.Generator().manual_seed(2)).bfloat16().to(device)
    w2 = (torch.randn(D, F, generator=torch.Generator().manual_seed(3)) / 20).bfloat16().to(device)
    b1, b2 = w2[0].clone(), w1[0].clone()
    s = srelu24.gemm_relu2_24(x, w1, b1)
    dense, ops = s.to_dense(), torch.ops.srelu24
    rows, columns, every = [Shard(0)], [Shard(1)], [Replicate()]
    cases: list[tuple[Callable[..., object], list[tuple[object, object]]]] = [
        (ops.ffn, [(x, rows), (w1, every), (w2, every), (b1, every), (b2, every)]),
        (ops.ffn, [(x, every), (w1, rows), (w2, columns), (b1, rows), (b2, every)]),
        (ops.ffn, [(x, every), (w1, rows), (w2, columns), (None, None), (None, None)]),
        (ops.linear, [(x, rows), (w1, every), (b1, every), ("relu2", None)]),
        (ops.linear, [(x, every), (w1, rows), (b1, rows), ("relu2", None)]),
        (ops.linear, [(dense, columns), (w2, columns), (b2, every), ("none", None)]),
        (ops.linear24, [(dense, rows), (w2, every), (b2, every)]),
        (ops.linear24, [(dense, columns), (w2, columns), (b2, every)]),
        (ops.gemm_relu2_24, [(x, rows), (w1, every), (b1, every)]),
        (ops.gemm_relu2_24, [(x, every), (w1, rows), (b1, rows)]),
        (ops.gemm_relu2_24_count, [(x, rows), (w1, every), (None, None)]),
        (ops.gemm_relu2_24_count, [(x, every), (w1, rows), (b1, rows)]),
        (ops.sparsify24, [(dense, rows), ("none", None)]),
        (ops.sparsify24, [(dense, columns), ("relu2", None)]),
        (ops.matmul, [(s.values, rows), (s.metadata, rows), (w2, every), (b2, every), (residual, rows)]),
        (ops.matmul, [(s.values, columns), (s.metadata, columns), (w2, columns), (b2, every), (residual, every)]),
    ]
    worst = 0.0
    for op, arguments in cases:
        spread = [distribute_tensor(t, mesh, p) if isinstance(t, Tensor) else t for t, p in arguments]
        found, wanted = op(*spread), op(*(t for t, _ in arguments))
        pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple | list) else [(found, wanted)]
        worst = max(worst, *(distance(full(ours), alone) for ours, alone in pairs))
    return worst


CASES = {
    case.__name__: case
    for case in (
        ddp,
        fsdp2,
        fsdp2_of_the_ffn,
        fsdp2_of_the_linears,
        fsdp2_recipe_state,
        profiles,
        tensor_parallel,
        tensor_parallel_collectives,
        sequence_parallel,
        styles_of_the_layers,
        refused_widths,
        recipe_ddp,
        recipe_fsdp2,
        refused_recipes,
        dtensor_ops,
    )
}


def main(rank: int, ranks: int, folder: Path, device: str) -> None:
    torch.set_num_threads(1)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    mesh = init_device_mesh(device, (ranks,))
    for name, case in CASES.items():
        try:
            found = f"{case(mesh, device)}"
        except (Exception, pytest.fail.Exception):
            found = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(found)
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
