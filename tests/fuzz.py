"""Calls of all ops, half of them hostile: `python -m tests.fuzz --calls N --seed S`.

Right calls are the drawn cases of the op tests, compared with the reference for equal bits on an
instruction set and a number of threads drawn as well. Hostile ones have arguments of any kind in
the place of some right ones: a result or a Python exception with a text, never a crash. All run in
child processes, a chunk of the calls each. Each call has random numbers of its own, so that
`--first I --calls 1` with the same seed makes call I once more.

Every op of tests/op_arguments.py has hostile calls as soon as it is there; one that has no right
calls yet is an error (RIGHT).
"""

import argparse
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # as a program, not as a part of the test run
    sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import test_ops_attention
import test_ops_blocks
import test_ops_conv1d
import test_ops_embedding
import test_ops_encoder
import test_ops_experts
import test_ops_grouped
import test_ops_half
import test_ops_linear
import test_ops_mixers
import test_ops_parts
import test_ops_relative
import test_ops_rnn
import torch
from compare import assert_all_same
from drawn import COLUMN_COUNTS, DEPTHS, DTYPES, LAYOUTS, LEADS, ROW_COUNTS, ROWS, Case
from op_arguments import ALL_OPS, call, valid_call, valid_grouped_arguments

import dynquant

CHUNK = 20_000
SECONDS_A_CALL = 60  # after which a call counts as hanging
ANY_DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.bool),
    *(torch.int8, torch.uint8, torch.int32, torch.int64),
)
KNOWN_DTYPES = range(8)  # as integers: uint8 to float64
INTEGERS = (-1, 0, 1, 4, 5, 7, 64, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63), 1 << 70)
SIZES = ({"m": (3,)}, {"m": (2, 3), "n": 65}, {"m": (1,), "k": 64}, {"m": (0,)})


def one_of(rng, values):
    return values[int(rng.integers(len(values)))]


def yes(rng):
    return bool(rng.integers(2))


# --- right calls: each draws a case and compares with the reference ---


def _of_a_test(test, **drawn):
    """Runs the body of a test that hypothesis draws for, with what was drawn here."""
    test.hypothesis.inner_test(isa=None, **drawn)


def _kinds(rng, names=tuple(ROWS)):
    return one_of(rng, [("normal",), names, *((name,) for name in names)])


def _case(rng, most_products=100_000, widths=(8, 16)):
    while True:
        symmetric = yes(rng)
        case = Case(
            m=one_of(rng, ROW_COUNTS),
            n=one_of(rng, COLUMN_COUNTS),
            k=one_of(rng, DEPTHS),
            lead=one_of(rng, [*LEADS, "[M]"]),
            layout=one_of(rng, list(LAYOUTS)),
            dtype=one_of(rng, DTYPES),
            kinds=_kinds(rng),
            per_token=yes(rng),
            symmetric=symmetric,
            bits=8 if symmetric else one_of(rng, widths),
            per_channel=yes(rng),
            bias_dtype=one_of(rng, [None, *DTYPES]),
            weight_magnitude=one_of(rng, [1e-2, 1.0, 1e-38, 1e-43, 1e30]),
            seed=int(rng.integers(1 << 32)),
        )
        if case.products <= most_products * (20 if rng.random() < 0.05 else 1):
            return case


def linear(rng):
    _of_a_test(test_ops_linear.test_drawn, case=_case(rng))


def activation(rng):
    _of_a_test(test_ops_parts.test_activation, case=_case(rng))


def given_parameters(rng):
    _of_a_test(test_ops_parts.test_given_parameters, case=_case(rng), zeros=rng.random() < 0.1)


def weight(rng):
    _of_a_test(test_ops_parts.test_weight, case=_case(rng))


def product(rng):
    _of_a_test(test_ops_parts.test_product, case=_case(rng, widths=(8,)))


def rescaled(rng):
    _of_a_test(test_ops_parts.test_rescale, case=_case(rng), dtype=one_of(rng, DTYPES))


def fused_product(rng):
    _of_a_test(
        test_ops_parts.test_fused_product, case=_case(rng, widths=(8,)), dtype=one_of(rng, DTYPES)
    )


def half(rng):
    case = _case(rng)
    _of_a_test(
        test_ops_half.test_is_the_specification,
        m=1 if case.products > 100_000 else case.m,
        n=min(case.n, 150),
        k=min(case.k, 300),
        dtype=case.dtype,
        half=one_of(rng, test_ops_half.HALVES),
        bias_dtype=case.bias_dtype,
        layout=case.layout,
        kinds=case.kinds,
        seed=case.seed,
    )


def embedding_table(rng):
    test = test_ops_embedding.TestQuantize()
    test.test_is_the_specification.hypothesis.inner_test(
        test,
        isa=None,
        count=int(rng.integers(10)),
        dim=one_of(rng, test_ops_embedding.WIDTHS),
        bits=one_of(rng, test_ops_embedding.BITS),
        dtype=one_of(rng, DTYPES),
        layout=one_of(rng, list(LAYOUTS)),
        kinds=_kinds(rng, tuple(test_ops_embedding.FINITE)),
        seed=int(rng.integers(1 << 32)),
    )


def embedding_rows(rng):
    count, dim = int(rng.integers(1, 50)), one_of(rng, test_ops_embedding.WIDTHS)
    bits, dtype = one_of(rng, test_ops_embedding.BITS), one_of(rng, DTYPES)
    table, arguments = test_ops_embedding.table(rng, count, dim, bits)
    indices = torch.from_numpy(rng.integers(0, count, (int(rng.integers(4)), 5)))
    indices = indices.to(one_of(rng, [torch.int64, torch.int32]))
    name = test_ops_embedding.NAMES[dtype]
    y = torch.ops.dynquant.embedding(indices, *arguments, dtype)
    assert_all_same([y], [test_ops_embedding.ref.embedding(indices.numpy(), *table, name)])


def embedding_bags(rng):
    _of_a_test(
        test_ops_embedding.test_bags_are_the_specification,
        sizes=[one_of(rng, [0, 0, 1, 2, 3, 11]) for _ in range(int(rng.integers(6)))],
        count=one_of(rng, [1, 2, 50]),
        dim=one_of(rng, test_ops_embedding.WIDTHS),
        bits=one_of(rng, test_ops_embedding.BITS),
        mode=one_of(rng, test_ops_embedding.MODES),
        kinds=one_of(rng, [("normal",), tuple(test_ops_embedding.FINITE)]),
        weights_dtype=one_of(rng, [None, *DTYPES]),
        padding=yes(rng),
        include_last=yes(rng),
        index_dtype=one_of(rng, [torch.int64, torch.int32]),
        offset_dtype=one_of(rng, [torch.int64, torch.int32]),
        dtype=one_of(rng, DTYPES),
        seed=int(rng.integers(1 << 32)),
    )


def _recurrent(cell, held):
    """held: what the weights are: "int8", "half", or "mixed"."""

    def check(rng):
        batch, symmetric = one_of(rng, [0, 1, 2, 3, 7]), yes(rng)
        kinds = tuple(one_of(rng, test_ops_rnn.KINDS) for _ in range(3))
        case = test_ops_rnn.Case(
            cell=one_of(rng, [cell] if cell != "rnn" else ["rnn_tanh", "rnn_relu"]),
            steps=one_of(rng, [1, 2, 3]),
            batch=batch,
            k=one_of(rng, [0, 1, 4, 15, 33]),
            size=one_of(rng, [1, 3, 7, 8, 15, 16, 17, 31]),
            projected=one_of(rng, [None, 1, 5]) if cell == "lstm" else None,
            dtype=one_of(rng, DTYPES),
            bias_dtypes=tuple(one_of(rng, [None, *DTYPES]) for _ in range(2)),
            packed=batch > 0 and yes(rng),
            reverse=yes(rng),
            per_token=yes(rng),
            symmetric=symmetric,
            per_channel=yes(rng),
            half=one_of(rng, test_ops_rnn.HALVES) if held == "half" else None,
            bits=8 if symmetric else one_of(rng, [8, 16]),
            mixed=kinds if held == "mixed" else None,
            layout=one_of(rng, list(LAYOUTS)),
            kinds=one_of(rng, [("normal",), ("normal", "zero"), tuple(ROWS)]),
            seed=int(rng.integers(1 << 32)),
        )
        assert_all_same(case.run(), case.expected())

    return check


def function(rng):
    name = one_of(rng, list(test_ops_blocks.ACTIVATIONS))
    _of_a_test(test_ops_blocks.test_activation, case=_case(rng), function=name)


def norms(rng):
    drawn = {"eps": one_of(rng, [0.0, 1e-12, 1e-5]), "plus_one": one_of(rng, [False, True])}
    _of_a_test(test_ops_blocks.test_norms, case=_case(rng), **drawn)


def softmaxes(rng):
    _of_a_test(test_ops_blocks.test_softmax, case=_case(rng))


def _of_a_seed(test):
    """A test that draws everything from a seed."""

    def check(rng):
        _of_a_test(test, threads=None, seed=int(rng.integers(1 << 32)))

    return check


RIGHT = {
    "quantize_weight": weight,
    "pack_weight": weight,
    "unpack_weight": weight,
    "choose_qparams": activation,
    "quantize_activation": activation,
    "quantize_with": given_parameters,
    "int_mm": product,
    "rescale": rescaled,
    "scaled_mm": fused_product,
    "linear_dynamic": linear,
    "conv1d_dynamic": _of_a_seed(test_ops_conv1d.test_is_the_specification),
    "linear_half": half,
    "linear_grouped": _of_a_seed(test_ops_grouped.test_is_the_specification),
    "quantize_embedding": embedding_table,
    "embedding": embedding_rows,
    "embedding_bag": embedding_bags,
    "embedding_sum": _of_a_seed(test_ops_blocks.test_embedding_sum),
    "activation": function,
    "layer_norm": norms,
    "rms_norm": norms,
    "softmax": softmaxes,
    "linear_block": _of_a_seed(test_ops_blocks.test_linear_block_is_its_parts),
    "feed_forward": _of_a_seed(test_ops_blocks.test_feed_forward_is_its_parts),
    "experts": _of_a_seed(test_ops_experts.test_is_the_specification),
    "rotary": _of_a_seed(test_ops_attention.test_rotary),
    "gated_delta_rule": _of_a_seed(test_ops_mixers.test_gated_delta_rule),
    "gated_delta_rule_": _of_a_seed(test_ops_mixers.test_gated_delta_rule),
    "selective_scan": _of_a_seed(test_ops_mixers.test_selective_scan),
    "selective_scan_": _of_a_seed(test_ops_mixers.test_selective_scan),
    "causal_conv1d": _of_a_seed(test_ops_mixers.test_causal_conv1d),
    "query_key_value": _of_a_seed(test_ops_attention.test_query_key_value_is_its_parts),
    "scaled_dot_product": _of_a_seed(test_ops_attention.test_scaled_dot_product),
    "relative_attention": _of_a_seed(test_ops_relative.test_is_the_specification),
    "attend": _of_a_seed(test_ops_attention.test_attend_is_its_parts),
    "attention": _of_a_seed(test_ops_attention.test_attention_is_its_parts),
    "encoder": _of_a_seed(test_ops_encoder.test_is_its_parts),
    "lstm_dynamic": _recurrent("lstm", "int8"),
    "gru_dynamic": _recurrent("gru", "int8"),
    "rnn_dynamic": _recurrent("rnn", "int8"),
    "lstm_half": _recurrent("lstm", "half"),
    "gru_half": _recurrent("gru", "half"),
    "rnn_half": _recurrent("rnn", "half"),
    "lstm_mixed": _recurrent("lstm", "mixed"),
    "gru_mixed": _recurrent("gru", "mixed"),
    "rnn_mixed": _recurrent("rnn", "mixed"),
}


# --- hostile calls ---


def any_tensor(rng):
    shape = tuple(int(size) for size in rng.choice([0, 1, 3, 5, 7, 8], rng.integers(0, 5)))
    with np.errstate(all="ignore"):
        values = torch.tensor(rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 40))
    tensor = torch.as_tensor(values).to(one_of(rng, ANY_DTYPES))
    change = rng.integers(10)
    if change == 0:
        return tensor.to("meta")
    if change == 1:
        return tensor.to_sparse()
    if change == 2 and tensor.ndim:
        return tensor.transpose(0, -1)
    if change == 3 and tensor.ndim:
        return tensor[..., ::2]
    if change == 4 and tensor.ndim and tensor.shape[0]:
        return tensor[:1].expand(tensor.shape)
    if change == 5 and tensor.is_floating_point():
        return tensor.requires_grad_()
    if change == 6 and tensor.numel():
        sizes, steps = rng.integers(0, 9, 2), rng.integers(0, 2, 2)
        enough = tensor.new_zeros(64)
        return enough.as_strided(sizes.tolist(), steps.tolist(), int(rng.integers(0, 40)))
    return tensor


def damaged(tensor, rng):
    """The right tensor with bytes overwritten, of another dtype or rank, shorter or longer."""
    change = rng.integers(7)
    if change == 0 and tensor.numel():
        tensor = tensor.clone().contiguous()
        flat = tensor.view(-1).view(torch.uint8)
        where = rng.integers(0, min(64, flat.numel()), 3)
        flat[where] = torch.from_numpy(rng.integers(0, 256, 3, dtype=np.uint8))
        return tensor
    if change == 1 and tensor.ndim:
        return tensor[: rng.integers(0, tensor.shape[0] + 1)]
    if change == 2 and tensor.ndim:
        return torch.cat([tensor, tensor])
    if change == 3:
        return tensor.to(one_of(rng, ANY_DTYPES))
    if change == 4 and tensor.ndim > 1:
        return tensor.mT
    if change == 5 and tensor.numel() and not tensor.is_floating_point():
        tensor = tensor.clone()
        tensor.view(-1)[rng.integers(tensor.numel())] = int(rng.choice([-1, 5, 100, 127]))
        return tensor
    return tensor[None]


def any_value(valid, rng):
    kind = rng.integers(4)
    if kind == 0:
        return any_tensor(rng)
    if kind == 1:
        return one_of(rng, INTEGERS)
    if kind == 2:
        choices = (None, "text", 1.5, torch.float64, torch.int8, True, [], torch.empty(0))
        return one_of(rng, choices)
    if isinstance(valid, list) and valid:
        return _changed_list(valid, rng)
    return damaged(valid, rng) if isinstance(valid, torch.Tensor) else valid


def _changed_list(valid, rng):
    """The list with something else in one place, or with another length."""
    at, change = int(rng.integers(len(valid))), rng.integers(4)
    if change == 0:
        return valid[:at]
    if change == 1:
        return [*valid, *valid[: at + 1]]
    one = damaged(valid[at], rng) if change == 2 and valid[at] is not None else any_tensor(rng)
    return [*valid[:at], None if rng.random() < 0.2 else one, *valid[at + 1 :]]


def _torch_would_crash(values):
    """Whether torch itself reads beyond its table of dtypes: it looks up the Python object of an
    integer in the place of a dtype where a kernel in Python (of meta tensors, of gradients) gets
    it, and does not check it. An op made with torch.library alone ends the process as well."""
    dtype = values.get("dtype")
    if not isinstance(dtype, int) or dtype in KNOWN_DTYPES:
        return False
    tensors = (value for value in values.values() if isinstance(value, torch.Tensor))
    return any(tensor.is_meta or tensor.requires_grad for tensor in tensors)


class Hostile:
    """Hostile calls of the ops, which all start from the same right ones."""

    def __init__(self):
        self.valid = {name: [valid_call(name, **sizes) for sizes in SIZES] for name in ALL_OPS}
        half = (valid_grouped_arguments(**sizes, half=True) for sizes in SIZES)
        self.valid["linear_grouped"] += half

    def __call__(self, name, rng):
        """Whether the call gave a result instead of an exception."""
        values = dict(one_of(rng, self.valid[name]))
        for argument in ALL_OPS[name]:
            if rng.random() < 0.25:
                values[argument] = any_value(values[argument], rng)
        if _torch_would_crash(values):
            values["dtype"] = torch.float64
        try:
            call(name, values)
        except Exception as error:
            assert str(error), f"{name}: an exception without a text"
            return False
        return True


# --- the tool ---


# What a call gave. Every second one is hostile and should give a result or an exception.
EQUAL, RESULT, EXCEPTION = "equal bits", "hostile: result", "hostile: exception"
DIFFERENT, CRASH = "different bits", "crash"
FAILURE = "failure"  # a right call's exception, or a hostile one's without a text
OUTCOMES = (EQUAL, RESULT, EXCEPTION, DIFFERENT, CRASH, FAILURE)


def _outcome(hostile, name, rng, is_hostile):
    """What one call gave, and the text of what went wrong or None."""
    try:
        if is_hostile:
            return RESULT if hostile(name, rng) else EXCEPTION, None
        RIGHT[name](rng)
        return EQUAL, None
    except Exception as error:
        differs = not is_hostile and isinstance(error, AssertionError)
        return DIFFERENT if differs else FAILURE, repr(error)


def make_calls(first, calls, seed, note=lambda index: None):
    """What calls first, first + 1, ... gave; `note` is told of each before it is made.

    Returns:
        (counts, failures): how many calls of each op had which outcome, as {op: {outcome: count}},
        and a text for each one that failed.
    """
    hostile, sets, names = Hostile(), dynquant.info()["available"], list(ALL_OPS)
    isa, threads = dynquant.info()["isa"], torch.get_num_threads()
    counts, failures = {}, []
    for index in range(first, first + calls):
        note(index)
        rng = np.random.default_rng([seed, index])
        name = one_of(rng, names)
        used = one_of(rng, sets)
        dynquant.set_isa(used)
        torch.set_num_threads(int(rng.integers(1, 4)))
        outcome, text = _outcome(hostile, name, rng, index % 2 == 1)
        _count(counts, name, outcome)
        if text is not None:
            failures.append(f"call {index}, {name}, {used}, {outcome}: {text}")
    dynquant.set_isa(isa)
    torch.set_num_threads(threads)
    return counts, failures


def _count(counts, name, outcome, more=1):
    of_op = counts.setdefault(name, {})
    of_op[outcome] = of_op.get(outcome, 0) + more


def op_of(index, seed):
    """Which op call number `index` is of."""
    return one_of(np.random.default_rng([seed, index]), list(ALL_OPS))


def _child(first, calls, seed, place):
    """Makes the calls, writes the one under way to the file `place`, prints what they gave."""
    with open(place, "r+b", buffering=0) as file:

        def note(index):
            faulthandler.dump_traceback_later(SECONDS_A_CALL, exit=True)
            os.pwrite(file.fileno(), b"%020d" % index, 0)

        print(json.dumps(make_calls(first, calls, seed, note)))


def _run_child(first, calls, seed):
    """What a child gives, and the index of the call that ended it and how, or None."""
    with tempfile.NamedTemporaryFile() as place:
        numbers = map(str, (first, calls, seed))
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", __file__, "--child", *numbers, place.name],
            # Freed memory is overwritten; waiting threads soon give their core to the others.
            env={"MALLOC_PERTURB_": "165", "GOMP_SPINCOUNT": "1000", **os.environ},
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return json.loads(done.stdout), None
        under_way = int(Path(place.name).read_bytes() or first)
    how = f"exit code {done.returncode}"
    if done.returncode < 0:
        how = signal.Signals(-done.returncode).name
    text = done.stderr  # a sanitizer says at the beginning what was wrong, Python at the end
    text = text if len(text) < 6000 else f"{text[:4000]}\n...\n{text[-2000:]}"
    return None, (under_way, f"{how}\n{text}")


def run(calls, seed, first=0, chunk=CHUNK):
    """Makes the calls in child processes and prints what they gave; the number of failures."""
    begin, totals, failures = time.monotonic(), {}, []
    while calls > 0:
        done = min(chunk, calls)
        found, ended = _run_child(first, done, seed)
        if ended is not None:  # once more up to there, and on behind it
            under_way, how = ended
            failures.append(f"call {under_way} ended the process: {how}")
            _count(totals, op_of(under_way, seed), CRASH)
            done = under_way - first + 1
            found, again = _run_child(first, done - 1, seed)
            if again is not None:
                failures.append(f"calls {first} to {under_way} end only sometimes: {again[1]}")
                found = {}, []
        counts, texts = found
        failures += texts
        for name, of_op in counts.items():
            for outcome, count in of_op.items():
                _count(totals, name, outcome, count)
        first, calls = first + done, calls - done
        sums, made = _sums(totals)
        parts = ", ".join(f"{outcome}: {count:,}" for outcome, count in sums.items())
        seconds = time.monotonic() - begin
        print(f"{made:,} calls in {seconds:.0f} s, seed {seed}; {parts}", flush=True)
    print(_table(totals))
    for failure in failures:
        print(failure)
    return len(failures)


def _sums(totals):
    """{outcome: count} over all ops, and the number of calls."""
    sums = {one: sum(of_op.get(one, 0) for of_op in totals.values()) for one in OUTCOMES}
    return sums, sum(sums.values())


def _table(totals):
    rows = [("op", "calls", *OUTCOMES)]
    for name in ALL_OPS:
        of_op = totals.get(name, {})
        rows.append((name, sum(of_op.values()), *(of_op.get(one, 0) for one in OUTCOMES)))
    sums, calls = _sums(totals)
    rows.append(("all", calls, *sums.values()))
    widths = [2 + max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]

    def line(name, *numbers):
        cells = (f"{one:>{width}}" for one, width in zip(numbers, widths[1:], strict=True))
        return f"{name:<{widths[0]}}" + "".join(cells)

    return "\n".join(line(*row) for row in rows)


def main():
    if sys.argv[1:2] == ["--child"]:
        _child(*map(int, sys.argv[2:5]), sys.argv[5])
        return 0
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=CHUNK)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the index of the first call")
    options = parser.parse_args()
    return 1 if run(options.calls, options.seed, options.first) else 0


if __name__ == "__main__":
    sys.exit(main())
