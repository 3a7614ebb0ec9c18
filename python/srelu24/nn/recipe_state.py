"""The state of a training recipe as buffers of its layer's module: in state dicts, and wherever the module goes.

    recipe_steps           int64 []   steps of the recipe, so that a copy that takes over buffers is in the same phase
    recipe_counts          int64 [F]  non-zeros of every feature since the last ranking
    recipe_rows            int64 []   tokens they were counted over
    recipe_dense_features  int64 [n]  the ranking

The tensors are those of the layer's :class:`~srelu24.training.recipe.LayerState`. The recipe itself holds the step on
the host, where asking costs nothing; a step that somebody else has written into the buffer, as load_state_dict and
AveragedModel do, is noticed by the tensor's version and taken over before the next forward pass.
"""

from __future__ import annotations

from torch import Tensor, nn

from srelu24.training.recipe import LayerState

PREFIX = "recipe_"
NAMES = ("steps", "counts", "rows", "dense_features")


def hold(module: nn.Module, state: LayerState) -> None:
    """Make the state's tensors buffers of the module, or those that are there the state's present ones."""
    for name in NAMES:
        module._buffers[PREFIX + name] = getattr(state, name)


def release(module: nn.Module) -> None:
    """Take the buffers away."""
    for name in NAMES:
        module._buffers.pop(PREFIX + name, None)


def adopt(module: nn.Module, state: LayerState, copies: bool = False) -> None:
    """Make the module's buffers the state's tensors, after they were moved, loaded or unpickled."""
    for name in NAMES:
        buffer = module._buffers[PREFIX + name]
        assert buffer is not None
        if copies:  # a spawned process shares the memory of what it was sent
            module._buffers[PREFIX + name] = buffer = buffer.clone()
        setattr(state, name, buffer)
    state.steps_seen = None


def follow(module: nn.Module, state: LayerState, x: Tensor) -> None:
    """Take over a step that was written into the buffer. A state that is still on the "meta" device begins anew where
    ``x`` is."""
    if state.counts.is_meta and not x.is_meta:
        state.to(x.device)
        hold(module, state)
    state.follow()


def ignored_by_ddp(paths: list[str]) -> list[str]:
    """Names of the buffers of layers, which each rank of DistributedDataParallel keeps for itself: it counts its own
    tokens."""
    return [f"{path}.{PREFIX}{name}" for path in paths for name in NAMES]
