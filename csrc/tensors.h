// torch.Tensor as seen from C++ without torch's own headers: through its descriptors and DLPack, which are public and the
// same in every torch.
#pragma once

#include <pybind11/pybind11.h>

#include "dlpack.h"

namespace polarfast::tensors {

namespace py = pybind11;

inline py::object owned(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// torch.Tensor's own descriptors, called directly: no attribute look-up for each of some 200 reads a step.
struct Members {
  py::object grad, requires_grad, is_neg;
  const dlpack::ExchangeApi* dlpack;

  Members() {
    const py::object tensor = py::module_::import("torch").attr("Tensor");
    grad = tensor.attr("grad");
    requires_grad = tensor.attr("requires_grad");
    is_neg = tensor.attr("is_neg");
    const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    dlpack = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (dlpack == nullptr) throw py::error_already_set();
    if (dlpack->version.major != 1) throw py::import_error("polarfast: this torch has another version of DLPack");
  }

  static const Members& get() {
    static const Members* members = new Members;  // never freed: the interpreter may be gone by then
    return *members;
  }
};

inline py::object read(const py::object& descriptor, PyObject* tensor) {
  return owned(Py_TYPE(descriptor.ptr())
                   ->tp_descr_get(descriptor.ptr(), tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor))));
}

inline bool is_set(const py::object& descriptor, PyObject* tensor) { return read(descriptor, tensor).ptr() == Py_True; }

inline bool negated(PyObject* tensor) {
  return owned(PyObject_Vectorcall(Members::get().is_neg.ptr(), &tensor, 1, nullptr)).ptr() != Py_False;
}

// Where a tensor lies and what it is; false where torch has no such answer: a tensor without memory of its own (sparse,
// wrapped, functional, meta), or no tensor at all.
inline bool view_of(PyObject* tensor, dlpack::View* found) {
  if (Members::get().dlpack->view_of(tensor, found) == 0) return true;
  PyErr_Clear();
  return false;
}

}  // namespace polarfast::tensors
