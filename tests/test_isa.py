"""Which instruction set runs: what is reported, and forcing another."""

import os
import subprocess
import sys

import pytest
import torch

import dynquant

KNOWN = ("scalar", "avx2", "avx512vnni_ymm", "avxvnni", "avx512vnni", "amx")


def in_new_process(name, code="import dynquant; print(dynquant.info()['isa'])"):
    environment = {k: v for k, v in os.environ.items() if k != "DYNQUANT_ISA"}
    if name is not None:
        environment["DYNQUANT_ISA"] = name
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )


def names_all_available(text):
    return all(name in text.rsplit("available:", 1)[-1] for name in dynquant.info()["available"])


def test_info():
    facts = dynquant.info()
    assert {"isa", "available", "declined", "threads", "cuda"} <= facts.keys()
    assert any("version" in key for key in facts), "versions are reported"
    assert facts["isa"] in facts["available"] and "scalar" in facts["available"]
    assert facts["threads"] == torch.get_num_threads()
    assert not set(facts["available"]) & set(facts["declined"])
    assert all(isinstance(why, str) and why for why in facts["declined"].values())
    assert set(KNOWN) <= set(facts["available"]) | set(facts["declined"])


def test_forcing(isa):
    assert dynquant.info()["isa"] == isa


@pytest.mark.parametrize("name", ["sse9", "", "AVX2 ", "scalar\0", "a" * 5000])
def test_an_unknown_name_is_refused(name):
    before = dynquant.info()["isa"]
    with pytest.raises(Exception, match="is not supported here; available: ") as error:
        dynquant.set_isa(name)
    assert names_all_available(str(error.value))
    assert dynquant.info()["isa"] == before


@pytest.mark.parametrize("name", [None, 3, b"scalar"])
def test_what_is_not_a_name_is_refused(name):
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        dynquant.set_isa(name)


def test_a_declined_one_is_refused():
    declined = dynquant.info()["declined"]
    if not declined:
        pytest.skip("this machine declines no instruction set")
    for name in declined:
        with pytest.raises(Exception, match=f"^set_isa: {name} is not supported here; available: "):
            dynquant.set_isa(name)


@pytest.mark.parametrize("name", dynquant.info()["available"])
def test_the_environment_variable_forces(name):
    done = in_new_process(name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == name


def test_the_best_is_chosen_without_it():
    done = in_new_process(None)
    best = max(dynquant.info()["available"], key=KNOWN.index)
    assert done.stdout.strip() == best


@pytest.mark.parametrize("name", ["sse9", "AVX512"])
def test_an_unknown_one_in_the_environment_is_an_error_at_import(name):
    done = in_new_process(name, "import dynquant")
    assert done.returncode == 1, "an exception, not a crash"
    text = f"DYNQUANT_ISA={name} is not supported here; available: "
    assert text in done.stderr and names_all_available(done.stderr)


def test_the_command_prints_the_facts():
    done = subprocess.run(
        [sys.executable, "-m", "dynquant", "info"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for key in ("isa", "available", "declined"):
        assert key in done.stdout
