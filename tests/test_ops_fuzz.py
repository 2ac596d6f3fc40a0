"""Any arguments whatever: the bits of the reference, or an exception, never a crash."""

import fuzz
from op_arguments import ALL_OPS

CALLS = 6000  # of all, half of them hostile; CONTRIBUTING.md has the command for many more


def test_in_processes_of_their_own(capsys):
    """A crash here is reported with its call instead of ending the test run."""
    assert fuzz.run(CALLS, seed=1, chunk=CALLS) == 0, capsys.readouterr().out


def test_a_crash_is_found_and_the_calls_go_on(monkeypatch, capsys):
    ended = iter([(None, (7, "SIGSEGV")), ({"right": 4, "wrong": []}, None)])
    rest = [({"right": 6, "wrong": ["call 14"]}, None)]
    given = []

    def child(first, calls, seed):
        given.append((first, calls))
        return next(ended, None) or rest.pop()

    monkeypatch.setattr(fuzz, "_run_child", child)
    assert fuzz.run(20, seed=0) == 2
    assert given == [(0, 20), (0, 7), (8, 12)]
    assert "call 7 ended the process: SIGSEGV" in capsys.readouterr().out


def test_the_same_seed_makes_the_same_calls():
    whole = fuzz.make_calls(0, 40, seed=3)
    parts = [fuzz.make_calls(first, 20, seed=3) for first in (0, 20)]
    for key in ("right", "hostile, a result", "hostile, an exception"):
        assert whole[key] == sum(part[key] for part in parts)


def test_a_wrong_bit_is_found(monkeypatch):
    def wrong(rng):
        raise AssertionError("1 of 2 differ")

    monkeypatch.setattr(fuzz, "RIGHT", dict.fromkeys(ALL_OPS, wrong))
    found = fuzz.make_calls(0, 10, seed=0)["wrong"]
    assert len(found) == 5 and all("1 of 2 differ" in one for one in found)


def test_every_op_has_right_calls():
    assert fuzz.RIGHT.keys() == ALL_OPS.keys()
