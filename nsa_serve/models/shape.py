"""Sizes that checkpoint families derive instead of stating."""


def next_power_of_2(value: int) -> int:
    """Return the least power of two that is at least `value` (value >= 1)."""
    return 1 << (value - 1).bit_length()


def fla_intermediate_size(hidden_size: int, hidden_ratio: int) -> int:
    """Return fla's MLP width: 2/3 of hidden_ratio * hidden_size, rounded up to 256."""
    width = int(hidden_size * hidden_ratio * 2 / 3)
    return -(-width // 256) * 256
