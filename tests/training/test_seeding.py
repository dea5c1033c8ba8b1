from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from plasticity_probe.training.seeding import derived_seed, generator

SEEDS = st.integers(0, 2**63 - 1)
NUMBERS = st.lists(st.integers(-(2**40), 2**40), max_size=4)


@given(SEEDS, st.text(max_size=10), NUMBERS)
def test_a_derived_seed_is_the_same_on_every_call_and_is_what_a_generator_takes(
    seed: int, label: str, numbers: list[int]
) -> None:
    derived = derived_seed(seed, label, *numbers)
    assert derived == derived_seed(seed, label, *numbers)
    assert 0 <= derived < 2**63
    assert generator(seed, label, *numbers).initial_seed() == derived


def test_derived_seeds_are_the_same_in_every_version() -> None:
    # Stored runs are rebuilt from their seeds, so these numbers must never change: first 8 bytes of BLAKE2b of the address, halved.
    assert derived_seed(0, "order", 0, 0) == 9068119046297306360
    assert derived_seed(12, "initial weights") == 8479488009142943894


def test_every_part_of_an_address_counts() -> None:
    addresses = [
        (seed, label, *numbers)
        for seed, label, numbers in product(
            range(12), ("a", "b", "order", ""), [(), (0,), (1,), (11,), (0, 0), (1, 1), (0, 1), (1, 0), (0, 0, 0)]
        )
    ]
    assert len({derived_seed(*address) for address in addresses}) == len(addresses)
    assert derived_seed(1, "a", 11) != derived_seed(1, "a", 1, 1) != derived_seed(11, "a", 1)


def test_the_bits_of_neighbouring_seeds_are_unrelated() -> None:
    count = 4000
    pairs = [(derived_seed(seed, "order", 0), derived_seed(seed + 1, "order", 0)) for seed in range(count)]
    flipped = torch.tensor([[(a ^ b) >> bit & 1 for bit in range(63)] for a, b in pairs], dtype=torch.float64).mean(0)
    # 63 bits are looked at, so 4.5 standard errors of a fair coin.
    assert ((flipped - 0.5).abs() < 4.5 * 0.5 / count**0.5).all()
    plain = torch.tensor([[(s ^ (s + 1)) >> bit & 1 for bit in range(63)] for s in range(count)]).double().mean(0)
    assert not ((plain - 0.5).abs() < 4.5 * 0.5 / count**0.5).all()


def test_drawing_leaves_the_global_generator_and_other_draws_alone() -> None:
    state = torch.get_rng_state()
    first = torch.randn(5, generator=generator(3, "x", 1))
    torch.randn(7, generator=generator(3, "y", 1))
    assert torch.equal(first, torch.randn(5, generator=generator(3, "x", 1)))
    assert torch.equal(torch.get_rng_state(), state)
