"""Wall time and peak memory of `probe analyze` with its defaults, by probe.

    python tests/benchmarks/analyze.py CHECKPOINT --data DATA [further arguments of probe analyze]

Runs the command line in a process of its own with a temporary trace, and prints one table in Markdown.
"""

import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from plasticity_probe.trace.reader import read_rows


def main() -> None:
    """Runs, reads the trace, prints."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.h5"
        command = ["-m", "plasticity_probe", "analyze", *sys.argv[1:], "--trace", str(trace), "--quiet"]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=False)
        seconds = time.perf_counter() - start
        rows = read_rows(trace)
    print(
        f"exit code {done.returncode}, {seconds:.0f} s in all, {date.today()}, torch {torch.__version__}, {machine()}\n"
    )
    networks = list(dict.fromkeys(f"{row.network} {row.replicate}".replace(" 0", "") for row in rows))
    print("| probe | examples | " + " | ".join(f"{name}, s" for name in networks) + " | peak memory, GB |")
    print("|---|---|" + "---|" * (len(networks) + 1))
    for label in dict.fromkeys(row.probe for row in rows):
        own = [row for row in rows if row.probe == label]
        cells = [str(own[0].conditions.get("examples", "")), *(f"{row.seconds:.1f}" for row in own)]
        print(f"| {label} | {' | '.join(cells)} | {max(row.peak_bytes for row in own) / 1e9:.2f} |")


def machine() -> str:
    """Processor and number of threads, in words."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
