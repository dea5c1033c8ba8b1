"""Measures without leaving a trace: global state is set for the length of a measurement and put back afterwards."""

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def isolated() -> Iterator[None]:
    """Runs a measurement in the numerical setting it needs and restores every global bit afterwards, also after an error.

    Inside: attention under the math backend (the fused ones have no second derivative), cuDNN deterministic, float32 products with all
    their bits, the fused encoder path off, compiled functions as they were written, no autocast, gradients on. Restored: the random states of
    torch (CPU and every CUDA device), numpy and random, and all those switches.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 -- the global state is what has to be kept
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        stack.callback(random.setstate, python_state)
        stack.callback(np.random.set_state, numpy_state)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_float32_precision(dict.fromkeys((*_CUDA, *_CPU), "ieee")))
        stack.enter_context(_repeatable_cudnn())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.cuda.is_available():
            stack.enter_context(torch.autocast("cuda", enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes on one core: what small networks are fastest on, several times so where other work shares the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def tensor_float32() -> Iterator[None]:
    """Lets CUDA's matrix products and convolutions of float32 tensors round their factors to the ten bits of TF32."""
    with _float32_precision(dict.fromkeys(_CUDA, "tf32")):
        yield


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Runs without cuDNN, whose recurrent kernels have no second derivative."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.enabled
    cudnn.enabled = False
    try:
        yield
    finally:
        cudnn.enabled = before


_BACKENDS: Any = torch.backends
_CUDA: tuple[Any, ...] = (_BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn)
_CPU: tuple[Any, ...] = (_BACKENDS.mkldnn.matmul, _BACKENDS.mkldnn.conv, _BACKENDS.mkldnn.rnn)


@contextmanager
def _float32_precision(wanted: Mapping[Any, str]) -> Iterator[None]:
    """Sets with how many bits backends multiply float32 numbers, on the CPU too, where some would take bfloat16."""
    before = [(backend, backend.fp32_precision) for backend in wanted]
    try:
        for backend, precision in wanted.items():
            backend.fp32_precision = precision
        yield
    finally:
        for backend, precision in before:
            backend.fp32_precision = precision


@contextmanager
def _repeatable_cudnn() -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
