"""Training a squared-ReLU FFN with a sparse backward: arXiv 2503.16672. The contract is docs/training.md."""
