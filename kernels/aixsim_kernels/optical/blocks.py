"""How much a CPU works on at a time: few enough elements to stay in a cache."""

import torch

# elements a thread works on at a time: few enough to stay in a cache with their temporaries
BLOCK = 1 << 18


def block_size() -> int:
    """Elements that are worked on at a time, on a CPU by all its threads together."""
    return BLOCK * torch.get_num_threads()
