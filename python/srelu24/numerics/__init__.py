"""What is computed: types, the packed 2:4 matrix, and the contract in plain PyTorch."""
