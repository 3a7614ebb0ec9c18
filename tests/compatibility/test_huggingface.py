"""Hugging Face models (tiny, from their configurations)"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import srelu24
from srelu24.nn.modules import Linear24, SquaredReLUFFN

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
HEADS = {"num_key_value_heads": 2}
RWKV = {"vocab_size": 64, "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 96}
HYBRID = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "head_dim": 8,
    "chunk_size": 8,
}
MODELS: dict[str, tuple[str, dict[str, Any], type, tuple[str, str]]] = {
    "Nemotron": ("NemotronConfig", SMALL | HEADS, SquaredReLUFFN, ("up_proj", "down_proj")),
    "Nemotron-H": (
        "NemotronHConfig",
        {k: v for k, v in SMALL.items() if k != "num_hidden_layers"} | HEADS | HYBRID,
        SquaredReLUFFN,
        ("up_proj", "down_proj"),
    ),
    "Persimmon": ("PersimmonConfig", SMALL, SquaredReLUFFN, ("dense_h_to_4h", "dense_4h_to_h")),
    "Arcee": ("ArceeConfig", SMALL | HEADS, SquaredReLUFFN, ("up_proj", "down_proj")),
    "nanochat": ("NanoChatConfig", SMALL | HEADS, SquaredReLUFFN, ("fc1", "fc2")),
    "RWKV": ("RwkvConfig", RWKV | {"num_hidden_layers": 2, "context_length": 64}, Linear24, ("key", "value")),
}
TOKENS = torch.arange(20)[None] % 64
Distance = Callable[[Tensor, Tensor], float]


def build(config: str, fields: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(4)  # initialised so small that the FFNs would hardly show in the logits
    return model.bfloat16().eval()


def seconds(model: nn.Module, name: str) -> Iterator[nn.Linear]:
    """Second layers of FFNs; attention has projections of these names too, but not from 96."""
    for path, module in model.named_modules():
        if path.endswith(f".{name}") and isinstance(module, nn.Linear) and module.in_features == 96:
            yield module


@pytest.mark.parametrize("model_name", MODELS)
def test_converted_is_the_masked_model(model_name: str, distance: Distance, masked: Callable[..., object]) -> None:
    """Nemotron, Nemotron-H, Persimmon, Arcee, nanochat and RWKV: converted logits are those of the masked model."""
    config, fields, layer, names = MODELS[model_name]
    model = build(config, fields)
    keys = list(model.state_dict())
    with torch.no_grad():
        dense = model(TOKENS).logits
        with masked(*seconds(model, names[1])):
            expected = model(TOKENS).logits
        report = srelu24.convert(model)
        y = model(TOKENS).logits
        assert len(report.converted) == 2
        assert sum(isinstance(module, layer) for module in model.modules()) == 2
        assert list(model.state_dict()) == keys
        assert distance(y, expected) < 0.03
        assert distance(y, dense) > 2 * distance(y, expected)
        report.revert()
        assert torch.equal(model(TOKENS).logits, dense)


@pytest.mark.parametrize("model_name", ["Nemotron", "Nemotron-H", "Persimmon", "nanochat"])
def test_converted_is_dense_where_nothing_is_dropped(model_name: str, distance: Distance) -> None:
    """The same models with at most two non-zeros in four: converted logits are those of the dense model."""
    config, fields, _, names = MODELS[model_name]
    model = build(config, fields)
    with torch.no_grad():
        for path, module in model.named_modules():
            if path.endswith(f".{names[0]}") and isinstance(module, nn.Linear) and module.out_features == 96:
                module.weight.view(-1, 4, 32)[:, 1::2] = 0
                if module.bias is not None:
                    module.bias.view(-1, 4)[:, 1::2] = 0
        dense = model(TOKENS).logits
        assert len(srelu24.convert(model).converted) == 2
        assert distance(model(TOKENS).logits, dense) < 0.02


def test_experts_are_named() -> None:
    """Nemotron-H with experts: shared experts are converted, routed experts in 3-D tensors are left and named."""
    config, fields, _, _ = MODELS["Nemotron-H"]
    experts = {"moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 48, "n_routed_experts": 4}
    model = build(config, fields | experts | {"layers_block_type": ["mlp", "moe"]})
    report = srelu24.convert(model)
    assert [done.d_ff for done in report.converted] == [96, 48]
    assert any("Experts" in left.kind for left in report.left)


@pytest.mark.parametrize("config", ["LlamaConfig", "BitNetConfig"])
def test_gated_models_are_left(config: str) -> None:
    """Llama and BitNet have gated FFNs: nothing is converted, and each is named."""
    model = build(config, SMALL | HEADS)
    before = [type(module) for module in model.modules()]
    report = srelu24.convert(model)
    assert not report.converted
    assert sum("gated" in left.why for left in report.left) == 2
    assert [type(module) for module in model.modules()] == before


def test_generation(distance: Distance) -> None:
    """generate() with a key-value cache runs on a converted model."""
    config, fields, _, _ = MODELS["Nemotron"]
    model = build(config, fields)
    srelu24.convert(model)
    tokens = model.generate(TOKENS[:, :4], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] <= 9
    assert torch.equal(tokens[:, :4], TOKENS[:, :4])


def test_save_pretrained(tmp_path: Any) -> None:
    """save_pretrained of a converted model loads as the original class."""
    config, fields, _, _ = MODELS["Nemotron"]
    model = build(config, fields)
    srelu24.convert(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not any(isinstance(module, SquaredReLUFFN) for module in loaded.modules())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
