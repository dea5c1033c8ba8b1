"""`python -m plasticity_probe` is the console script `probe`."""

from plasticity_probe.cli import main

if __name__ == "__main__":
    main()
