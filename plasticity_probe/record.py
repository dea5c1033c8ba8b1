"""A measurement and how it came about: one bad checkpoint is a status in its record, never a crash."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from plasticity_probe.measurement import Measurement, Status
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import Subject
from plasticity_probe.probe import Need, Probe, generator_for


@dataclass(frozen=True)
class Checkpoint:
    """A file and where it stands.

    Args:
        run: Which training run it belongs to.
        step: Its training step; -1 where unknown.
        task: The task it belongs to; -1 where unknown.
        path: The file as it was named; empty for a model that came as an object.
        sha256: Hash of the file, or of the weights of an object.
        network: "checkpoint", or "fresh" for a newly initialised network of the same architecture, the yardstick.
        replicate: Which of several fresh networks; 0 otherwise.
    """

    run: str
    step: int
    task: int
    path: str
    sha256: str
    network: str = "checkpoint"
    replicate: int = 0


@dataclass(frozen=True, eq=False)
class Record:
    """A measurement with its place and its history.

    Args:
        label: What the probe is called in this analysis; its name, where it runs once.
        probe: The probe with its settings.
        checkpoint: Where the measured network stands.
        seed: Seed of the run.
        status: Whether the numbers can be relied on.
        message: What happened, if not: likely causes and remedies.
        seconds: Wall time of the measurement.
        peak_bytes: Largest memory of the process (CPU) or of the device (GPU) meanwhile; -1 where it cannot be known.
        measurement: The numbers; None where the probe could not run.
    """

    label: str
    probe: Probe[Measurement]
    checkpoint: Checkpoint
    seed: int
    status: Status
    message: str
    seconds: float
    peak_bytes: int
    measurement: Measurement | None


def run_probe(probe: Probe[Measurement], subject: Subject, label: str, checkpoint: Checkpoint) -> Record:
    """Measures one probe on one subject and records how it went; never raises for what goes wrong inside the probe.

    Args:
        probe: The probe.
        subject: The network, loss and examples.
        label: The probe's label, which its random draws depend on.
        checkpoint: Where the network stands.
    """
    start = time.perf_counter()
    measurement, status, message = None, Status.FAILED, ""
    with _peak_memory(subject.device) as peak:
        bad = nonfinite_weights(subject) if Need.GRADIENTS in probe.needs else ()
        if bad:
            status, message = Status.NONFINITE, _NONFINITE.format(names=", ".join(bad[:5]), count=len(bad))
        else:
            try:
                with isolated():
                    generator = generator_for(subject.seed, label, checkpoint.step - checkpoint.replicate)
                    measurement = probe.measure(subject, generator)
                status, message = measurement.status, measurement.message
            except (MemoryError, torch.OutOfMemoryError) as error:
                message = f"out of memory: {error}. Ask for fewer examples, or a smaller memory budget."
            except Exception as error:  # a probe of a third party may raise anything; the others still have to run
                message = f"{type(error).__name__}: {error}"
    return Record(
        label, probe, checkpoint, subject.seed, status, message, time.perf_counter() - start, peak[0], measurement
    )


def nonfinite_weights(subject: Subject) -> tuple[str, ...]:
    """Names of the parameters and buffers that hold NaN or Inf."""
    tensors = subject.model.state_dict()
    return tuple(name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all())


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    peak = [-1]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device)
        return
    # Writing 5 resets the high-water mark of this process on Linux; elsewhere the peak stays unknown.
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    known = status.exists()
    if known:
        try:
            clear.write_text("5")
        except OSError:
            known = False
    yield peak
    if known:
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        peak[0] = int(line.split()[1]) * 1024


_NONFINITE = (
    "the weights hold NaN or Inf in {count} tensors ({names}): training diverged or the file is damaged. Look at an earlier checkpoint, or "
    "train with a smaller learning rate or gradient clipping."
)
