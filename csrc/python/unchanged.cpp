#include "unchanged.h"

namespace dynquant {
namespace {

namespace py = pybind11;

// A borrowed reference, or null.
PyObject* found(const py::tuple& tuple, Py_ssize_t dict) {
  PyObject* from = PyTuple_GET_ITEM(tuple.ptr(), dict);
  if (!PyDict_Check(from)) return nullptr;
  PyObject* value = PyDict_GetItemWithError(from, PyTuple_GET_ITEM(tuple.ptr(), dict + 1));
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

// After a forward, none of all this is in a near cache any more: the objects that later questions
// are about, and what dicts keep their keys in, are fetched ahead.
void fetch_ahead(const py::tuple& tuple, Py_ssize_t i, Py_ssize_t step) {
  const Py_ssize_t size = PyTuple_GET_SIZE(tuple.ptr());
  if (i + 16 * step < size) __builtin_prefetch(PyTuple_GET_ITEM(tuple.ptr(), i + 16 * step));
  if (i + 8 * step >= size) return;
  PyObject* next = PyTuple_GET_ITEM(tuple.ptr(), i + 8 * step);
  if (!PyDict_Check(next)) return;
  const PyDictObject* dict = reinterpret_cast<PyDictObject*>(next);
  const char* keys = reinterpret_cast<const char*>(dict->ma_keys);
  for (int line = 0; line < 5; ++line) __builtin_prefetch(keys + 64 * line);
  const char* values = reinterpret_cast<const char*>(dict->ma_values);
  if (values != nullptr) {
    __builtin_prefetch(values);
    __builtin_prefetch(values + 64);
  }
}

template <class F>
bool all_of(const py::tuple& tuple, Py_ssize_t step, const F& f) {
  const Py_ssize_t size = PyTuple_GET_SIZE(tuple.ptr());
  if (size % step != 0) return false;
  for (Py_ssize_t i = 0; i < size; i += step) {
    fetch_ahead(tuple, i, step);
    if (!f(i)) return false;
  }
  return true;
}

}  // namespace

bool unchanged(const py::tuple& same, const py::tuple& empty, const py::tuple& absent,
               const py::tuple& types) {
  const auto is_same = [&](Py_ssize_t i) {
    PyObject* value = found(same, i);
    return value != nullptr && value == PyTuple_GET_ITEM(same.ptr(), i + 2);
  };
  const auto is_empty = [&](Py_ssize_t i) {
    PyObject* value = found(empty, i);
    return value != nullptr && PyDict_Check(value) && PyDict_GET_SIZE(value) == 0;
  };
  const auto is_absent = [&](Py_ssize_t i) {
    return PyDict_Check(PyTuple_GET_ITEM(absent.ptr(), i)) && found(absent, i) == nullptr;
  };
  const auto is_of_type = [&](Py_ssize_t i) {
    PyObject* kind = PyTuple_GET_ITEM(types.ptr(), i + 1);
    return reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GET_ITEM(types.ptr(), i))) == kind;
  };
  return all_of(types, 2, is_of_type) && all_of(same, 3, is_same) && all_of(empty, 2, is_empty) &&
         all_of(absent, 2, is_absent);
}

}  // namespace dynquant
