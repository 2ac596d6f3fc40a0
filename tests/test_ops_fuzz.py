"""Any arguments whatever: the bits of the reference, or an exception, never a crash."""

import re
from collections import Counter

import fuzz
from op_arguments import ALL_OPS

CALLS = 6000  # of all, half of them hostile; CONTRIBUTING.md has the command for many more


def test_in_processes_of_their_own(capsys):
    """A crash here is reported with its call instead of ending the test run."""
    assert fuzz.run(CALLS, seed=1, chunk=CALLS) == 0, capsys.readouterr().out


def test_a_crash_is_found_and_the_calls_go_on(monkeypatch, capsys):
    linear = {"linear_dynamic": {fuzz.EQUAL: 7}}
    ended = iter([(None, (7, "SIGSEGV")), ((linear, []), None)])
    rest = [(({"softmax": {fuzz.EQUAL: 11, fuzz.DIFFERENT: 1}}, ["call 14"]), None)]
    given = []

    def child(first, calls, seed):
        given.append((first, calls))
        return next(ended, None) or rest.pop()

    monkeypatch.setattr(fuzz, "_run_child", child)
    assert fuzz.run(20, seed=0) == 2
    assert given == [(0, 20), (0, 7), (8, 12)]
    printed = capsys.readouterr().out
    assert "call 7 ended the process: SIGSEGV" in printed and "\ncall 14\n" in printed
    assert re.search(
        r"\n20 calls in \d+ s, seed 0; equal bits: 18, .*different bits: 1, crash: 1, fail", printed
    )
    assert re.search(r"\nsoftmax +1[23] +11 +0 +0 +1 +\d +0\n", printed)


def test_the_same_seed_makes_the_same_calls():
    whole, _ = fuzz.make_calls(0, 40, seed=3)
    parts = [fuzz.make_calls(first, 20, seed=3)[0] for first in (0, 20)]
    for name in ALL_OPS:
        both = Counter(parts[0].get(name, {})) + Counter(parts[1].get(name, {}))
        assert both == whole.get(name, {})
        assert sum(fuzz.op_of(i, 3) == name for i in range(40)) == sum(both.values())


def test_a_wrong_bit_is_found(monkeypatch):
    def wrong(rng):
        raise AssertionError("1 of 2 differ")

    monkeypatch.setattr(fuzz, "RIGHT", dict.fromkeys(ALL_OPS, wrong))
    counts, found = fuzz.make_calls(0, 10, seed=0)
    assert len(found) == 5 and all("1 of 2 differ" in one for one in found)
    assert sum(of_op.get(fuzz.DIFFERENT, 0) for of_op in counts.values()) == 5


def test_every_op_has_right_calls():
    assert fuzz.RIGHT.keys() == ALL_OPS.keys()
