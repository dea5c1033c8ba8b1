"""Parameter names without the prefixes that wrappers put before them."""

from collections import Counter
from collections.abc import Collection, Iterable
from itertools import product

# DataParallel, DistributedDataParallel and AveragedModel add "module."; torch.compile adds "_orig_mod.", also inside a name.
_WRAPPERS = frozenset({"module", "_orig_mod"})
# What a LightningModule or another training class calls the network it holds.
_HOLDERS = frozenset({"model", "net"})
_MOST_LEADING = 16
_INSIDE = (frozenset[str](), frozenset({"_orig_mod"}), frozenset({"module"}), _WRAPPERS)

# The step counter of torch.optim.swa_utils.AveragedModel, which is no part of the network.
_AVERAGE_COUNTER = "n_averaged"


def strip_prefixes(keys: Iterable[str], wanted: Collection[str] | None) -> dict[str, str]:
    """Removes the prefixes "module.", "_orig_mod.", "model." and "net." where that helps.

    With `wanted`, every way of removing some leading prefixes, and "module" and "_orig_mod" inside names, is tried on all keys alike; the
    one that matches most of `wanted` is taken, and of equals the one that removes least. Without, "_orig_mod" goes
    everywhere, and the others as long as every key begins with the same one.

    Args:
        keys: The names in a state dict.
        wanted: The names in the network that they are meant for, if it is known.

    Returns:
        The new name of each key, in the order given, no two alike: a key keeps its name where the new one would be another's. The counter
        "n_averaged" of an averaged model has no new name, unless it is wanted.
    """
    keys = [key for key in dict.fromkeys(keys) if key != _AVERAGE_COUNTER or key in (wanted or ())]
    if wanted is None:
        return _without_common_prefixes(keys)
    targets = frozenset(wanted)
    most = max((_leading(key.split(".")) for key in keys), default=0)
    ways = [
        _distinct(keys, [_stripped(key, count, inside) for key in keys])
        for inside, count in product(_INSIDE, range(most + 1))
    ]
    return max(ways, key=lambda way: sum(name in targets for name in way.values()))


def _leading(components: list[str]) -> int:
    """How many prefixes a name begins with; its last component is never one."""
    count = 0
    while count < min(len(components) - 1, _MOST_LEADING) and components[count] in _WRAPPERS | _HOLDERS:
        count += 1
    return count


def _stripped(key: str, count: int, inside: frozenset[str]) -> str:
    components = key.split(".")
    rest = components[min(count, _leading(components)) :]
    return ".".join([*(component for component in rest[:-1] if component not in inside), rest[-1]])


def _without_common_prefixes(keys: list[str]) -> dict[str, str]:
    names = [_stripped(key, 0, frozenset({"_orig_mod"})) for key in keys]
    while (
        names
        and len(firsts := {name.partition(".")[0] for name in names}) == 1
        and all(_leading(name.split(".")) for name in names)
    ):
        names = [name.removeprefix(f"{next(iter(firsts))}.") for name in names]
    return _distinct(keys, names)


def _distinct(keys: list[str], names: list[str]) -> dict[str, str]:
    """Keys with their new names; where several would be named alike, each of them keeps its old name."""
    way = dict(zip(keys, names, strict=True))
    while True:
        count = Counter(way.values())
        clashing = [key for key, name in way.items() if count[name] > 1 and name != key]
        if not clashing:
            return way
        way.update((key, key) for key in clashing)
