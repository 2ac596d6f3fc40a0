"""What a compiler may do that changes no result and costs much of the speed: spill the sums of a
tile or the place of the next row to the stack, or drop the requests for rows that come later."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import dynquant

LIBRARY = Path(dynquant.__file__).with_name("libdynquant.so")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(.*)$")
BACKWARD = re.compile(r"^j\w+\s+([0-9a-f]+)")
PRODUCT = re.compile(r"\bvpdpbusds?\b|\bvpmaddwd\b|\btdpbusd\b")
CORRECTION = re.compile(r"\bvpmulld\b")  # of a row's sums, for its zero point
STACK = re.compile(r"\(%r[sb]p")
STACK_WRITE = re.compile(r",\s*-?(0x[0-9a-f]+)?\(%r[sb]p")
SETS = ("Avx2", "YmmVnni", "Avx512Vnni")


def functions():
    """(name, [(address, instruction)]) of each function of the library."""
    text = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", LIBRARY],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    name, body = None, []
    for line in text.splitlines():
        if found := FUNCTION.match(line):
            if name is not None:
                yield name, body
            name, body = found[1], []
        elif found := INSTRUCTION.match(line):
            body.append((int(found[1], 16), found[2]))
    if name is not None:
        yield name, body


def inner_loops(body):
    """The innermost loops that multiply: from the target of a backward jump to the jump."""
    loops = []
    for address, instruction in body:
        jump = BACKWARD.match(instruction)
        if jump and int(jump[1], 16) <= address:
            loop = [(a, i) for a, i in body if int(jump[1], 16) <= a <= address]
            if any(PRODUCT.search(i) for _, i in loop):
                loops.append(loop)
    return [loop for loop in loops if not any(set(o) < set(loop) for o in loops)]


@pytest.fixture(scope="module")
def kernels():
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    wanted = re.compile(r"::(tile|bags\w*|bag_\w+)<|::AmxTiles")
    found = {name: body for name, body in functions() if wanted.search(name)}
    if not found:
        pytest.skip("the library is stripped of its symbols")
    return found


@pytest.mark.parametrize("isa_type", SETS)
def test_inner_loops_stay_in_registers(kernels, isa_type):
    tiles = {name: body for name, body in kernels.items() if "::tile<" in name}
    of_set = {name: body for name, body in tiles.items() if f"::{isa_type}," in name}
    assert of_set, f"no tile of {isa_type} in the library"
    for name, body in of_set.items():
        loops = inner_loops(body)
        assert loops, f"no loop that multiplies in {name}"
        for loop in loops:
            spilled = [instruction for _, instruction in loop if STACK.search(instruction)]
            assert not spilled, f"{name}: {spilled}"


def is_loop_over_tiles(loop):
    """Of a block's four products, with the epilogue of the block before between them."""
    instructions = [instruction for _, instruction in loop]
    return sum("tdpbusd" in i for i in instructions) == 4 and any(
        CORRECTION.search(i) for i in instructions
    )


def test_epilogues_between_tiles_stay_in_registers(kernels):
    """Were the place of the next row in memory, each would wait for the stores of the one before.
    What jumps back from the rest of a function looks like a further loop, so one has to be right.
    """
    of_tiles = {
        name: [loop for loop in inner_loops(body) if is_loop_over_tiles(loop)]
        for name, body in kernels.items()
        if "AmxTiles" in name
    }
    of_tiles = {name: loops for name, loops in of_tiles.items() if loops}
    assert len(of_tiles) == 14, list(of_tiles)  # outputs and forms of blocks
    for name, loops in of_tiles.items():
        written = [[i for _, i in loop if STACK_WRITE.search(i)] for loop in loops]
        assert not all(written), f"{name}: {written}"


@pytest.mark.parametrize("isa_type", SETS)
def test_bags_ask_for_rows_ahead(kernels, isa_type):
    of_set = {
        name: body for name, body in kernels.items() if re.search(rf"::bag.*{isa_type}\b", name)
    }
    assert of_set, f"no bags of {isa_type} in the library"
    asking = [n for n, body in of_set.items() if any("prefetch" in i for _, i in body)]
    assert asking, f"nothing is prefetched in {list(of_set)}"
