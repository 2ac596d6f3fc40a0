"""Repairs one wheel with auditwheel: python tools/repair_wheel.py WHEEL OUTPUT_FOLDER

The libraries are stripped, the tag becomes the oldest manylinux that their symbols allow, and
torch's own libraries stay outside: they are those of the torch that is installed.
"""

import subprocess
import sys

TORCHS_OWN = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so")


def repair(wheel, folder):
    excluded = [option for name in TORCHS_OWN for option in ("--exclude", name)]
    command = ["auditwheel", "repair", "--strip", *excluded, "-w", str(folder), str(wheel)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    repair(*sys.argv[1:])
