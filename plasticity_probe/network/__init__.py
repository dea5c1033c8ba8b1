"""A network seen as tensors and operators: the only place with hooks and automatic differentiation."""
