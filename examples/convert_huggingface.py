"""Converts a Hugging Face model with squared-ReLU FFNs, compares its outputs and its speed.

    python examples/convert_huggingface.py                  # a GPU: two layers as wide as Nemotron-4 15B; else tiny
    python examples/convert_huggingface.py --d-model 4096 --d-ff 16384 --tokens 8192

The weights are random. At initialisation half of the activations are non-zero, so pruning drops far more than in a
trained model: the profile says how much.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from transformers import AutoModelForCausalLM, NemotronConfig

import srelu24
from srelu24.measuring import timing


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=6144 if gpu else 64)
    parser.add_argument("--d-ff", type=int, default=24576 if gpu else 256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096 if gpu else 64)
    parser.add_argument("--seconds", type=float, default=5.0 if gpu else 0.2, help="of timing")
    args = parser.parse_args()
    device = "cuda" if gpu else "cpu"

    heads = max(2, args.d_model // 128)
    config = NemotronConfig(
        vocab_size=1024,
        hidden_size=args.d_model,
        intermediate_size=args.d_ff,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=args.tokens,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval()
    ids = torch.randint(0, 1024, (1, args.tokens), device=device)

    print("what 2:4 would drop, layer by layer:")
    print(srelu24.profile(model, ids))

    with torch.inference_mode():
        dense = model(ids).logits
        conversion = srelu24.convert(model)
        print(conversion)
        srelu24.warmup(model, tokens=[args.tokens])
        pruned = model(ids).logits
        change = (pruned.float() - dense.float()).norm() / dense.float().norm()
        agree = (pruned.argmax(-1) == dense.argmax(-1)).float().mean()
        print(f"logits moved by {change:.2%} of their norm; {agree:.1%} of the most likely tokens are the same")

        # Both are timed in one run, in turns: see docs/benchmarks.md for why. The FFN alone is what changed.
        converted = model.model.layers[0].mlp
        conversion.revert()
        original = model.model.layers[0].mlp
        x = torch.randn(args.tokens, args.d_model, device=device).bfloat16()
        timings = timing.interleave(
            {"dense": partial(original, x), "srelu24": partial(converted, x)}, device=device, seconds=args.seconds
        )
    ratio = timing.ratio(timings["srelu24"], timings["dense"])
    print(f"one FFN: dense {timings['dense'].ms:.3f} ms, srelu24 {timings['srelu24'].ms:.3f} ms, {ratio:.2f}x")
    if not gpu:
        print("without a GPU srelu24 runs its reference, which is there to be right, not fast")


if __name__ == "__main__":
    main()
