"""Which parameters of a network are measured: those whose names fit a pattern; the others become constants."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from plasticity_probe.errors import SubjectError, UnknownNameError

LISTED = 30
"""Names that an error lists at most before it lists modules instead (our choice: a screenful)."""


def freeze_others(network: nn.Module, patterns: str | Sequence[str]) -> None:
    """Freezes every parameter of a network that no pattern fits; a tied parameter stays where one of its names is fitted.

    Args:
        network: The network, changed in place.
        patterns: One or several patterns (`*`, `?`, `[...]`) of names of parameters, or of modules, which stand for everything below them.

    Raises:
        UnknownNameError: A pattern fits no parameter.
        SubjectError: All parameters that are fitted are frozen already.
    """
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    named = list(network.named_parameters(remove_duplicate=False))
    names = [name for name, _ in named]
    for pattern in wanted:
        if not any(_fits(name, pattern) for name in names):
            raise UnknownNameError("parameter or module", pattern, _known(names))
    kept = {id(parameter) for name, parameter in named if any(_fits(name, pattern) for pattern in wanted)}
    for _, parameter in named:
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise SubjectError(
            f"expected at least one trainable parameter among those that fit {', '.join(wanted) or 'no pattern'}, but they are frozen. Set "
            "requires_grad=True on those you ask for."
        )


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern fits the name of a parameter or of a module that it belongs to."""
    return any(fnmatchcase(prefix, pattern) for prefix in (name, *_modules(name)))


def _modules(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _known(names: Iterable[str]) -> set[str]:
    """The names of parameters and modules, from the deepest level at which they can be listed."""
    found = {prefix for name in names for prefix in (name, *_modules(name))}
    depths = sorted({name.count(".") for name in found}, reverse=True)
    for depth in depths:
        listed = {name for name in found if name.count(".") <= depth}
        if len(listed) <= LISTED:
            return listed
    return {name for name in found if "." not in name}
