// The Python module _C: the kernel table, detection, forcing an instruction set, and the raw
// kernels over numpy arrays. It shares libdynquant's state.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/float_env.h"
#include "../cpu/layout.h"
#include "../cpu/staged.h"
#include "../ops/split.h"
#include "probes.h"
#include "unchanged.h"

namespace py = pybind11;

namespace dynquant {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

std::vector<std::string> available() {
  std::vector<std::string> names;
  int count = 0;
  const IsaEntry* entries = isa_entries(&count);
  for (int i = 0; i < count; ++i) {
    if (entries[i].missing() == nullptr) names.emplace_back(entries[i].kernels()->name);
  }
  return names;
}

std::map<std::string, std::string> declined() {
  std::map<std::string, std::string> reasons;
  int count = 0;
  const IsaEntry* entries = isa_entries(&count);
  for (int i = 0; i < count; ++i) {
    if (const char* reason = entries[i].missing()) reasons[entries[i].kernels()->name] = reason;
  }
  return reasons;
}

py::object current_isa() {
  const Kernels* kernels = current_kernels();
  return kernels == nullptr ? py::object(py::none()) : py::object(py::str(kernels->name));
}

bool set_isa(const std::string& name) {
  return name.find('\0') == std::string::npos && set_kernels(name.c_str());
}

const Kernels& kernels_of(const std::string& isa) {
  const Kernels* kernels = find_kernels(isa.c_str());
  if (kernels == nullptr) throw py::value_error(isa + " is not available here");
  return *kernels;
}

py::tuple range(const std::string& isa, const Array<float>& x) {
  const FloatEnv env;
  const Range r = kernels_of(isa).range(x.data(), Dtype::f32, x.size());
  return py::make_tuple(r.lo, r.hi, r.has_nan);
}

Array<uint8_t> quantize(const std::string& isa, const Array<float>& x, float inv,
                        int32_t zero_point, int32_t q_min, int32_t q_max) {
  Array<uint8_t> q(x.size());
  const FloatEnv env;
  kernels_of(isa).quantize({x.data(), Dtype::f32, x.size(), inv, zero_point, q_min, q_max, 0,
                            q.mutable_data(), nullptr});
  return q;
}

Array<float> activate(const std::string& isa, const std::string& function, const Array<float>& x) {
  if (function != "sigmoid" && function != "tanh") {
    throw py::value_error("function is " + function + "; allowed: sigmoid, tanh");
  }
  Array<float> y(x.size());
  const FloatEnv env;
  kernels_of(isa).activate({function == "tanh" ? Activation::tanh : Activation::sigmoid, Dtype::f32,
                            x.data(), nullptr, x.size(), y.mutable_data()});
  return y;
}

Array<int32_t> gemm(const std::string& isa, const Array<uint8_t>& q,
                    const Array<int32_t>& zero_point, const Array<int8_t>& packed) {
  const Kernels& kernels = kernels_of(isa);
  PackedHeader header = {};
  if (packed.size() >= kHeaderBytes) std::memcpy(&header, packed.data(), sizeof header);
  if (header.magic != kPackedMagic || header.version != kLayoutVersion ||
      packed.size() != packed_bytes(header.n, header.k)) {
    throw py::value_error("packed is not a weight packed by pack_weight");
  }
  if (q.ndim() != 2 || q.shape(1) != header.k || zero_point.size() != q.shape(0)) {
    throw py::value_error("q must have the shape [M, K] of packed, and zero_point [M]");
  }
  const int64_t m = q.shape(0);
  const Product& product = product_for(kernels, m, header.n, header.k);
  const int64_t stride = staged_stride(product.layout, groups_of(header.k));
  const Aligned staged(staged_bytes(product.layout, stride, m));
  Array<int32_t> out({m, header.n});
  const FloatEnv env;
  for (int64_t row = 0; row < m; ++row) {
    product.stage(q.data() + row * header.k, header.k, 0,
                  staged.data + staged_offset(product.layout, stride, row));
  }
  GemmArgs a = {};
  a.staged = staged.data;
  a.staged_stride = stride;
  a.zero_point = zero_point.data();
  a.m = m;
  a.panels = packed.data() + kHeaderBytes;
  a.groups = groups_of(header.k);
  a.n_end = header.n;
  a.epilogue.out = out.mutable_data();
  a.epilogue.out_dtype = Dtype::i32;
  a.epilogue.out_stride = header.n;
  product.gemm(a);
  return out;
}

std::map<std::string, double> costs(const std::string& isa, int64_t m, int64_t n, int64_t k) {
  const Costs c = split_costs(product_for(kernels_of(isa), m, n, k).costs, n, k);
  return {{"multiply_add", c.multiply_add},
          {"weight_byte", c.weight_byte},
          {"quantized_value", c.quantized_value},
          {"panel_row", c.panel_row}};
}

py::tuple split(const std::string& isa, int64_t m, int64_t n, int64_t k, int64_t threads,
                bool small_parts) {
  const Product& product = product_for(kernels_of(isa), m, n, k);
  Split s = choose_split(m, n, k, threads, product.costs, product.row_multiple);
  if (small_parts) s = in_small_parts(s, n);
  std::vector<std::vector<int64_t>> parts;
  for (int64_t task = 0; task < s.parts(); ++task) {
    const Part part = part_of(s, task, m, n);
    parts.push_back({part.m_begin, part.m_end, part.n_begin, part.n_end});
  }
  return py::make_tuple(s.rows, s.columns, s.row_multiple, s.stage_first, parts);
}

}  // namespace
}  // namespace dynquant

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernel table, detection and raw kernels of dynquant, over numpy arrays.";
  m.attr("layout_version") = dynquant::kLayoutVersion;
  m.attr("max_k") = dynquant::kMaxK;
  m.def("packed_bytes", &dynquant::packed_bytes, py::arg("n"), py::arg("k"));
  m.def("columns_of", &dynquant::columns_of, py::arg("bytes"), py::arg("k"));
  m.def("available", &dynquant::available, "Instruction sets that run here, best first.");
  m.def("declined", &dynquant::declined, "Those that do not, with the reason.");
  m.def("current_isa", &dynquant::current_isa, "The one in use; None if DYNQUANT_ISA is wrong.");
  m.def("set_isa", &dynquant::set_isa, py::arg("name"), "False if it cannot run here.");
  m.def("unchanged", &dynquant::unchanged, py::arg("same"), py::arg("empty"), py::arg("absent"),
        py::arg("types"),
        "Whether dict[key] is value for each (dict, key, value) of same, holds an empty dict for "
        "each (dict, key) of empty and nothing for each of absent, and type(one) is kind for each "
        "(one, kind) of types; each is one flat tuple.");
  m.def("range", &dynquant::range, py::arg("isa"), py::arg("x"),
        "(min(0, min x), max(0, max x), has NaN) of a float32 array.");
  m.def("quantize", &dynquant::quantize, py::arg("isa"), py::arg("x"), py::arg("inv"),
        py::arg("zero_point"), py::arg("q_min"), py::arg("q_max"),
        "clamp(rint(x * inv) + zero_point, q_min, q_max) as bytes.");
  m.def("activate", &dynquant::activate, py::arg("isa"), py::arg("function"), py::arg("x"),
        "sigmoid or tanh of each value of a float32 array, flattened.");
  m.def("gemm", &dynquant::gemm, py::arg("isa"), py::arg("q"), py::arg("zero_point"),
        py::arg("packed"), "(q - zero_point) @ weight.T in int32; q is uint8 [M, K].");
  m.def("costs", &dynquant::costs, py::arg("isa"), py::arg("m"), py::arg("n"), py::arg("k"),
        "Nanoseconds that the parts of such a product take, by which it is split.");
  m.def("split", &dynquant::split, py::arg("isa"), py::arg("m"), py::arg("n"), py::arg("k"),
        py::arg("threads"), py::arg("small_parts") = false,
        "How a product is split: (parts of rows, parts of columns, the multiple of rows at which "
        "parts begin, whether rows are staged first, [m_begin, m_end, n_begin, n_end] of each); "
        "small_parts: as where the weight comes from memory and threads take part after part.");
  m.def(
      "peak_rate",
      [](const std::string& isa, double seconds) {
        return dynquant::peak_rate(dynquant::kernels_of(isa), seconds);
      },
      py::arg("isa"), py::arg("seconds") = 0.1,
      "Multiply-adds a second of the set's product on registers alone, one thread.");
  m.def(
      "read_rate",
      [](const std::string& isa, int64_t bytes, double seconds) {
        return dynquant::read_rate(dynquant::kernels_of(isa), bytes, seconds);
      },
      py::arg("isa"), py::arg("bytes"), py::arg("seconds") = 0.1,
      "Bytes a second of reading a buffer of that size, one thread.");
  m.def(
      "linear_seconds",
      [](const std::string& isa, int64_t rows, int64_t n, int64_t k, double seconds) {
        return dynquant::linear_seconds(dynquant::kernels_of(isa), rows, n, k, seconds);
      },
      py::arg("isa"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("seconds") = 0.1,
      "Seconds of one quantization and product, fp32 in and out, one thread.");
}
