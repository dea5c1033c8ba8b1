"""Random draws that depend on what they are for and on nothing else.

Every draw of a run has an address: the run's seed, a label and numbers such as a task and an epoch. No state is carried from one draw to
the next, so a run that was killed and resumed draws what it would have drawn.
"""

from hashlib import blake2b

import torch


def derived_seed(seed: int, label: str, *numbers: int) -> int:
    """A seed for one draw, from 0 to 2^63 - 1.

    Args:
        seed: Seed of the run.
        label: What the draw is for.
        numbers: Where it stands: a task, an epoch, a step.
    """
    address = "\n".join([str(seed), label, *map(str, numbers)])
    return int.from_bytes(blake2b(address.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, label: str, *numbers: int) -> torch.Generator:
    """A generator on the CPU for one draw; the CPU gives every device the same numbers.

    Args:
        seed: Seed of the run.
        label: What the draw is for.
        numbers: Where it stands: a task, an epoch, a step.
    """
    return torch.Generator().manual_seed(derived_seed(seed, label, *numbers))
