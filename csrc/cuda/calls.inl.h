// Which kernels an op launches, in which order: written once over a `Stream` type, which is CUDA's
// (stream.h), or in tests the emulator's. Nothing here waits, and all memory is the caller's.
//
// A Stream has launch<Kernel>(grid, shared_bytes, args), processors() and async_copies().
#pragma once

#include "plan.h"
#include "quantize.inl.h"
#include "weight.inl.h"

namespace dynquant {

enum class Parameters : int32_t {
  own,    // of each row
  whole,  // one for the tensor
  given,
};

constexpr int64_t kMostRanges = RangeKernel<Dtype::f32>::kMostRanges;

namespace calls {

template <Dtype D, bool Divide, int RowThreads, class Stream>
void quantize_rows(const Stream& stream, const QuantizeRowsArgs& a) {
  using Kernel = QuantizeRowsKernel<D, RowThreads, Divide>;
  stream.template launch<Kernel>(Kernel::grid(a.rows.m), Kernel::shared_bytes(), a);
}

template <Dtype D, bool Divide, class Stream>
void quantize_own(const Stream& stream, const QuantizeRowsArgs& a) {
  if (a.rows.m == 0) return;
  if constexpr (Divide) {  // weights, once
    return quantize_rows<D, Divide, 512>(stream, a);
  } else {
    // As few threads as can hold a row.
    constexpr int64_t kHeldBytes = 16 * QuantizeRowsKernel<D, 32, Divide>::kHeld;
    const int64_t threads = ceil_div(a.rows.k * kValueBytes<D>, kHeldBytes);
    if (threads <= 32) return quantize_rows<D, Divide, 32>(stream, a);
    if (threads <= 128) return quantize_rows<D, Divide, 128>(stream, a);
    if (threads <= 512) return quantize_rows<D, Divide, 512>(stream, a);
    return quantize_rows<D, Divide, 1024>(stream, a);
  }
}

template <Dtype D, bool Divide, class Stream>
void quantize_known(const Stream& stream, const QuantizeRowsArgs& a) {
  using Kernel = QuantizeKnownKernel<D, Divide>;
  stream.template launch<Kernel>(Kernel::grid(a.rows.m, a.q_bytes), Kernel::shared_bytes(), a);
}

template <Dtype D, class Stream>
void quantize(const Stream& stream, QuantizeRowsArgs a, Parameters parameters, Range* ranges) {
  if (parameters == Parameters::whole) {
    using Kernel = RangeKernel<D>;
    const Grid grid = Kernel::grid(a.rows.m, a.rows.k);
    if (grid.x > 0) stream.template launch<Kernel>(grid, Kernel::shared_bytes(), {a.rows, ranges});
    a.ranges = ranges;
    a.range_count = static_cast<int>(grid.x);
  }
  const bool divide = parameters == Parameters::given || a.rule == Rule::weight;
  if (parameters == Parameters::own) {
    divide ? quantize_own<D, true>(stream, a) : quantize_own<D, false>(stream, a);
  } else {
    divide ? quantize_known<D, true>(stream, a) : quantize_known<D, false>(stream, a);
  }
}

}  // namespace calls

// Quantizes rows, or finds their parameters alone where a.q is null. `ranges` has room for
// kMostRanges where the parameters are the whole tensor's.
template <class Stream>
void quantize(const Stream& stream, Dtype dtype, const QuantizeRowsArgs& a, Parameters parameters,
              Range* ranges) {
  switch (dtype) {
    case Dtype::bf16:
      return calls::quantize<Dtype::bf16>(stream, a, parameters, ranges);
    case Dtype::f16:
      return calls::quantize<Dtype::f16>(stream, a, parameters, ranges);
    default:
      return calls::quantize<Dtype::f32>(stream, a, parameters, ranges);
  }
}

// Elements of int32 that the product needs besides its arguments.
inline int64_t partial_sums(const Plan& plan, int64_t m, int64_t n) {
  return plan.parts > 1 ? plan.parts * m * n : 0;
}

template <class Stream>
void add_up(const Stream& stream, const SumArgs& a) {
  if (a.finish.m == 0 || a.finish.n == 0) return;
  stream.template launch<SumKernel>(SumKernel::grid(a.finish.m, a.finish.n), 0, a);
}

// Rows times a packed weight; a.splits and a.partial are set here.
template <class Stream>
void product(const Stream& stream, const Plan& plan, ProductArgs a, int32_t* partial) {
  const FinishArgs& f = a.finish;
  if (f.m == 0 || f.n == 0) return;
  a.splits = plan.parts;
  a.partial = partial;
  const auto launch = [&](auto kernel) {
    using Kernel = decltype(kernel);
    const int shared = Kernel::shared_bytes(stream.async_copies());
    stream.template launch<Kernel>(Kernel::grid(f.m, f.n, plan.parts), shared, a);
  };
  switch (plan.method) {
    case Method::gemv:
      switch (f.m) {
        case 1:
          launch(GemvKernel<1>{});
          break;
        case 2:
          launch(GemvKernel<2>{});
          break;
        case 3:
          launch(GemvKernel<3>{});
          break;
        default:
          launch(GemvKernel<4>{});
      }
      break;
    case Method::large:
      launch(GemmKernel<LargeTile>{});
      break;
    case Method::wide:
      launch(GemmKernel<WideTile>{});
      break;
    case Method::square:
      launch(GemmKernel<SquareTile>{});
      break;
    case Method::low:
      launch(GemmKernel<LowTile>{});
      break;
    case Method::least:
      launch(GemmKernel<LeastTile>{});
  }
  if (plan.parts > 1) add_up(stream, {partial, f.n, f.m * f.n, plan.parts, f});
}

template <class Stream>
void stage(const Stream& stream, const StageArgs& a) {
  if (a.m == 0 || a.staged_stride == 0) return;
  stream.template launch<StageKernel>(StageKernel::grid(a.m), 0, a);
}

template <class Stream>
void pack(const Stream& stream, const PackArgs& a) {
  stream.template launch<PackKernel>(PackKernel::grid(a.n), PackKernel::shared_bytes(), a);
}

template <class Stream>
void unpack(const Stream& stream, const UnpackArgs& a) {
  if (a.n == 0 || a.k == 0) return;
  stream.template launch<UnpackKernel>(UnpackKernel::grid(a.n), 0, a);
}

}  // namespace dynquant
