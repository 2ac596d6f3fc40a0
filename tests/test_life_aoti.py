"""A quantized model as an AOTInductor package, run from Python and from C++ without Python."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from compare import assert_same
from torch import nn

import dynquant

ROWS, WIDTH = 5, 12
TORCH = Path(torch.__file__).parent

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler, and g++ is not there"
)


def given(rows=ROWS):
    """What tests/cpp/aoti_main.cpp makes."""
    return ((torch.arange(rows * WIDTH).float() % 7 - 3) / 4).view(rows, WIDTH)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The quantized model, and the path of its package."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 20), nn.ReLU(), nn.Linear(20, 6, bias=False))
    model = dynquant.quantize_dynamic(model)
    path = tmp_path_factory.mktemp("aoti") / "model.pt2"
    rows = torch.export.Dim("rows", min=1, max=4096)
    options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    with torch.no_grad():
        program = torch.export.export(model, (given(),), dynamic_shapes=({0: rows},))
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=options
        )
    return model, path


def test_from_python(package):
    model, path = package
    loaded = torch._inductor.aoti_load_package(str(path))
    for rows in (ROWS, 1, 33):
        assert_same(loaded(given(rows)), model(given(rows)))


def test_from_cpp_without_python(package, tmp_path):
    model, path = package
    program = tmp_path / "aoti_main"
    source = Path(__file__).parent / "cpp" / "aoti_main.cpp"
    command = [
        *("g++", "-std=c++20", "-O0", "-w", source, "-o", program),
        *(f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"),
        *(f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"),
        f"-Wl,-rpath,{TORCH / 'lib'}",
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    library = Path(dynquant.__file__).with_name("libdynquant.so")
    done = subprocess.run(
        [program, library, path, str(ROWS), str(WIDTH)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    result = torch.tensor([float.fromhex(line) for line in done.stdout.split()])
    assert_same(result.view(ROWS, 6), model(given()))
