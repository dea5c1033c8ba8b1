"""Measures without leaving a trace: global state is set for the length of a measurement and put back afterwards."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def isolated() -> Iterator[None]:
    """Runs a measurement in the numerical setting it needs and restores every global bit afterwards, also after an error.

    Inside: attention under the math backend (the fused ones have no second derivative), cuDNN and TF32 off, the fused encoder path off,
    no autocast, gradients on. Restored: the random states of torch (CPU and every CUDA device), numpy and random, and all those switches.
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
        stack.enter_context(_full_precision_products())
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
def _full_precision_products() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul.allow_tf32
    cudnn: Any = torch.backends.cudnn
    before = cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = False, False, True, False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = before
