"""Several callers at once, with an instruction set that changes meanwhile."""

import callers


def test_the_bits_of_one_caller():
    callers.run(rounds=10)
