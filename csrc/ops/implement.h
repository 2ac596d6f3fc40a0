// Registers the ops of ops.h for the device of the library that defines them.
#pragma once

#include "op_scope.h"
#include "ops.h"

namespace dynquant {

// The one way to register an op: it is called within an OpScope, in the arithmetic of the
// specification, whatever the caller has set, and the caller finds its own afterwards.
class Implementations {
 public:
  explicit Implementations(torch::stable::detail::StableLibrary& library) : library_(library) {}

  // `op` under each of the names; with overloads, "name" and "name.overload".
  template <auto* op, class... Names>
  void add(Names... names) {
    (library_.impl(names, &call<op>), ...);
  }

 private:
  template <auto* op>
  static void call(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
    const OpScope scope;
    TORCH_BOX(op)(stack, inputs, outputs);
  }

  torch::stable::detail::StableLibrary& library_;
};

inline void implement(Implementations& ops) {
  ops.add<&quantize_weight>("quantize_weight");
  ops.add<&pack_weight>("pack_weight");
  ops.add<&unpack_weight>("unpack_weight");
  ops.add<&choose_qparams>("choose_qparams");
  ops.add<&quantize_activation>("quantize_activation");
  ops.add<&quantize_with>("quantize_with");
  ops.add<&int_mm>("int_mm");
  ops.add<&rescale>("rescale");
  ops.add<&scaled_mm>("scaled_mm");
  ops.add<&linear_dynamic>("linear_dynamic", "linear_dynamic.inference");
  ops.add<&linear_grouped>("linear_grouped");
}

}  // namespace dynquant
