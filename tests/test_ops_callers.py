"""Several callers at once, with an instruction set that changes meanwhile."""

import callers


def test_the_bits_of_one_caller():
    callers.run(rounds=10)


def test_drawn_calls_have_the_bits_of_the_reference():
    callers.run_drawn(calls=40, seed=0)
