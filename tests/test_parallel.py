"""Sharded linear layers in two processes: the bits of one process."""

import traceback

import pytest
import torch
import torch.distributed as dist
from compare import assert_same
from torch import nn

import dynquant

TIMEOUT = 120

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch.distributed has no gloo here", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import parallelize_module  # noqa: E402

from dynquant.parallel import ColwiseParallel, RowwiseParallel  # noqa: E402

QCONFIGS = [
    dynquant.QConfig(weight, activation, symmetric)
    for weight, activation in (("per_channel", "per_token"), ("per_tensor", "per_tensor"))
    for symmetric in (False, True)
]


class Block(nn.Module):
    def __init__(self, k, hidden, n, bias=True):
        super().__init__()
        self.up = nn.Linear(k, hidden, bias=bias)
        self.down = nn.Linear(hidden, n, bias=bias)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


PLAN = {"up": ColwiseParallel, "down": RowwiseParallel}


def pair(k, hidden, n, qconfig=None, dtype=torch.float32, bias=True):
    """A quantized Block, and the same one sharded."""
    torch.manual_seed(k + hidden + n)
    block = Block(k, hidden, n, bias).to(dtype)
    whole = dynquant.quantize_dynamic(block, {nn.Linear: qconfig or dynquant.QConfig()})
    sharded = dynquant.quantize_dynamic(block, {nn.Linear: qconfig or dynquant.QConfig()})
    mesh = init_device_mesh("cpu", (2,))
    return whole, parallelize_module(sharded, mesh, {name: PLAN[name]() for name in PLAN}), mesh


def check_blocks():
    for k, hidden, n in ((64, 256, 64), (37, 101, 51), (1, 2, 1), (300, 1, 7)):
        for qconfig in QCONFIGS:
            whole, sharded, _ = pair(k, hidden, n, qconfig)
            for shape in ((k,), (1, k), (2, 5, k), (0, k)):
                x = torch.randn(shape)
                assert_same(sharded(x), whole(x), f"{shape} {hidden} {n} {qconfig}")


def check_other_dtypes_and_no_bias():
    for dtype in (torch.bfloat16, torch.float16):
        whole, sharded, _ = pair(48, 96, 40, dtype=dtype, bias=False)
        x = torch.randn(4, 48, dtype=dtype)
        assert_same(sharded(x), whole(x), dtype)
    whole, sharded, _ = pair(48, 96, 40)
    x = torch.randn(4, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(sharded(x), whole(x))


def check_rows_that_are_not_finite():
    for qconfig in QCONFIGS:
        for value in (torch.nan, torch.inf, -torch.inf, 3e38):
            whole, mesh = rowwise(qconfig)
            for column in (3, 60):  # in either part
                x = torch.randn(5, 64)
                x[1, column], x[1, 7], x[2] = value, -value, 0
                assert_same(mesh(x), whole(x), f"{value} {column} {qconfig}")


def rowwise(qconfig):
    """A Linear, and its sharded form for a whole x."""
    torch.manual_seed(1)
    linear = nn.Linear(64, 40)
    whole = dynquant.nn.Linear.from_float(linear, qconfig)
    sharded = dynquant.nn.Linear.from_float(linear, qconfig)
    style = RowwiseParallel(input_layouts=Replicate())
    return whole, parallelize_module(sharded, init_device_mesh("cpu", (2,)), style)


def check_layouts():
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(2)
    linear, x = nn.Linear(64, 40), torch.randn(6, 64)
    expected = dynquant.quantize_dynamic(linear)(x)
    for style in (ColwiseParallel, RowwiseParallel):
        for given in (Replicate(), Shard(0), Shard(-1)):
            for asked in (Replicate(), Shard(0), Shard(-1)):
                layouts = {"input_layouts": given, "output_layouts": asked}
                sharded = dynquant.nn.Linear.from_float(linear)
                parallelize_module(sharded, mesh, style(**layouts, use_local_output=False))
                spread = distribute_tensor(x, mesh, [given])
                for one in (spread, spread.to_local()):
                    y = sharded(one)
                    placement = Shard(1) if asked == Shard(-1) else asked
                    assert y.placements in ((asked,), (placement,)), (style, given, asked)
                    assert_same(y.full_tensor(), expected, f"{style} {given} {asked}")


def check_parts_of_uneven_width():
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(3)
    for k in (5, 1):
        linear, x = nn.Linear(k, 3), torch.randn(6, k)
        expected = dynquant.quantize_dynamic(linear)(x)
        local = distribute_tensor(x, mesh, [Shard(-1)]).to_local()
        for style in (ColwiseParallel, RowwiseParallel):
            for layout in (Shard(-1), Shard(1)):
                sharded = dynquant.nn.Linear.from_float(linear)
                layouts = {"input_layouts": layout, "output_layouts": Replicate()}
                parallelize_module(sharded, mesh, style(**layouts))
                assert_same(sharded(local), expected, f"{style} {layout} {k}")


def check_inputs_that_do_not_fit():
    """Every process raises, and none waits for another."""
    mesh = init_device_mesh("cpu", (2,))
    for style in (ColwiseParallel, RowwiseParallel):
        for layout in (Replicate(), Shard(0), Shard(-1)):
            sharded = dynquant.nn.Linear.from_float(nn.Linear(5, 3))
            parallelize_module(sharded, mesh, style(input_layouts=layout))
            for shape in ((2, 6), (2, 1), ()):
                message = "x must have K = [523] as its last"
                assert_refused(message, sharded, torch.ones(shape))


def assert_refused(message, function, argument):
    with pytest.raises(RuntimeError, match=message):
        function(argument)


def check_gradients():
    whole, sharded, _ = pair(64, 256, 64)
    x = torch.randn(4, 64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    whole(x).square().sum().backward()
    sharded(other).square().sum().backward()
    torch.testing.assert_close(other.grad, x.grad)  # sums of floats: their order differs
    whole, sharded = rowwise(dynquant.QConfig())
    whole(x := x.detach().requires_grad_()).square().sum().backward()
    sharded(other := x.detach().clone().requires_grad_()).square().sum().backward()
    torch.testing.assert_close(other.grad, x.grad)


def check_state():
    whole, sharded, mesh = pair(37, 101, 51)
    expected = whole.state_dict()
    state = sharded.state_dict()
    assert state.keys() == expected.keys()
    for key, value in state.items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        assert_same(value, expected[key], key)
    float_block = Block(37, 101, 51)
    requantized = dynquant.quantize_dynamic(float_block)
    x = torch.randn(3, 37)
    for given, wanted in (
        (requantized.state_dict(), requantized),
        (state, whole),
        (float_block.state_dict(), requantized),
    ):
        _, target, _ = pair(37, 101, 51)
        target.load_state_dict(given)
        assert_same(target(x), wanted(x))
    assert sharded.down.weight.shape == (51, 101)
    assert "in_features=101, out_features=51" in repr(sharded.down)


def check_state_errors():
    whole, sharded, _ = pair(37, 101, 51)
    expected = whole.state_dict()
    for entries, message in (
        (
            pair(37, 100, 51)[0].state_dict(),
            r"up.weight_int8: expected the shape \[101, 37\], found \[100, 37\]",
        ),
        ({"up.bias": torch.zeros(100)}, r"up.bias: expected the shape \[101\], found \[100\]"),
        # As long as the scales of one process.
        ({"up.weight_scale": torch.ones(51)}, r"up.weight_scale: expected the shape \[101\] or"),
        ({"up.weight": torch.zeros(101, 37)}, "up.weight is torch.float32, but up.weight_int8 is"),
        ({"up.weight_int8": None}, "up.weight_int8: expected a tensor, found NoneType"),
    ):
        assert_refused(message, sharded.load_state_dict, {**expected, **entries})
    floats = Block(37, 101, 51).state_dict()
    for weight, message in (
        (torch.full((51, 101), torch.nan), "down.weight holds NaN or Inf"),
        (
            torch.zeros(51, 101).double(),
            "down.weight: expected .*found torch.float64",
        ),
    ):
        assert_refused(message, sharded.load_state_dict, {**floats, "down.weight": weight})


def check_memory():
    whole, sharded, _ = pair(256, 1024, 256)
    for name in PLAN:
        part = getattr(sharded, name).packed.numel() / getattr(whole, name).packed.numel()
        assert part < 0.6, (name, part)


def check_compile():
    whole, sharded, _ = pair(64, 256, 64)
    x = torch.randn(4, 64)
    assert_same(torch.compile(sharded, backend="eager")(x), whole(x))


CHECKS = (
    check_blocks,
    check_other_dtypes_and_no_bias,
    check_rows_that_are_not_finite,
    check_layouts,
    check_parts_of_uneven_width,
    check_inputs_that_do_not_fit,
    check_gradients,
    check_state,
    check_state_errors,
    check_memory,
    check_compile,
)


def worker(rank, store, queue):
    """Runs every check in one of two processes, which put (name, rank, traceback or None)."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for check in CHECKS:
        try:
            check()
            queue.put((check.__name__, rank, None))
        except BaseException:
            queue.put((check.__name__, rank, traceback.format_exc()))
            raise
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """By (check, rank): None or a traceback."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    store = tmp_path_factory.mktemp("store") / "file"
    processes = [
        context.Process(target=worker, args=(rank, store, queue), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = {}
    try:
        while len(found) < 2 * len(CHECKS):
            name, rank, error = queue.get(timeout=TIMEOUT)
            found[name, rank] = error
            if error:
                break
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return found


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_processes(check, outcomes):
    for rank in range(2):
        error = outcomes.get((check.__name__, rank), "not reached")
        assert error is None, f"process {rank}: {error}"


class OneProcessMesh:
    ndim = 1


@pytest.mark.parametrize("module", [nn.Linear(4, 4), nn.ReLU()])
@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
def test_other_modules_are_refused(module, style):
    with pytest.raises(TypeError, match=f"{style.__name__}.*{type(module).__name__}"):
        style()._apply(module, OneProcessMesh())


@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
@pytest.mark.parametrize(
    "name, value",
    [("input_layouts", "x"), ("output_layouts", (Shard(0),)), ("use_local_output", 1)],
)
def test_wrong_arguments(style, name, value):
    with pytest.raises(TypeError, match=f"{name} is .*; expected a"):
        style(**{name: value})


def test_a_mesh_of_two_dimensions_is_refused():
    mesh = OneProcessMesh()
    mesh.ndim = 2
    linear = dynquant.nn.Linear.from_float(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="one dimension, got 2"):
        ColwiseParallel()._apply(linear, mesh)
    assert type(linear) is dynquant.nn.Linear


@pytest.fixture
def mesh_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_layer_that_cannot_be_sharded_is_left_as_it_was(mesh_of_one):
    """The range of the whole row takes two columns: 65,535 are one too many in a process."""
    linear = dynquant.nn.Linear.from_float(nn.Linear(65_535, 2))
    attributes, state = dict(vars(linear)), linear.state_dict()
    x = torch.randn(3, 65_535)
    expected = linear(x)
    with pytest.raises(ValueError, match="65,535 of 65,535 columns; at most 65,534"):
        parallelize_module(linear, mesh_of_one, RowwiseParallel())
    assert type(linear) is dynquant.nn.Linear
    assert vars(linear) == attributes
    for key, value in linear.state_dict().items():
        assert_same(value, state[key], key)
    assert_same(linear(x), expected)
    parallelize_module(linear, mesh_of_one, ColwiseParallel())
    assert_same(linear(x), expected)
    largest = dynquant.nn.Linear.from_float(nn.Linear(65_534, 2))
    expected = largest(x[:, 1:])
    parallelize_module(largest, mesh_of_one, RowwiseParallel())
    assert_same(largest(x[:, 1:]), expected)
