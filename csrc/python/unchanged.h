// Whether modules are as they were, told from their dicts in one call: in Python, the same
// questions take as long as a layer of a small model does.
#pragma once

#include <pybind11/pybind11.h>

namespace dynquant {

// Whether `dict[key] is value` for each three of `same`, whether `dict[key]` has nothing in it for
// each two of `empty`, whether no `key` is in the dict for each two of `absent`, and whether
// `type(one) is kind` for each two of `types`. The tuples are flat; every first is a dict, but in
// `types`. What else lies in them makes the answer false.
bool unchanged(const pybind11::tuple& same, const pybind11::tuple& empty,
               const pybind11::tuple& absent, const pybind11::tuple& types);

}  // namespace dynquant
