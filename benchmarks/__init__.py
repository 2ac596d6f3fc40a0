"""What dynquant is compared with, and how: `python -m benchmarks --help`."""
