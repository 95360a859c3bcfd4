"""The smallest DiT that Fashion-MNIST's images go through: arguments of its constructor."""

SHAPE = {
    "input_size": 28,
    "patch_size": 14,
    "in_channels": 1,
    "hidden_size": 16,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 10,
}
