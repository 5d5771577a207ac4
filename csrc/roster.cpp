#include "roster.h"

#include "tensors.h"

namespace polarfast {

namespace py = pybind11;

namespace {

// group["params"], which torch's optimizers make a list.
py::list params_of(const py::handle& group) {
  static PyObject* key = PyUnicode_InternFromString("params");
  return py::list(tensors::owned(PyObject_GetItem(group.ptr(), key)));
}

bool trains(PyObject* gamma) { return tensors::is_set(tensors::Members::get().requires_grad, gamma); }

}  // namespace

void Roster::remember(const py::list& param_groups) {
  train_.clear();
  groups_.clear();
  for (const py::handle group : param_groups) {
    auto& params = groups_.emplace_back();
    for (const py::handle param : params_of(group)) params.push_back(py::reinterpret_borrow<py::object>(param));
  }
  for (const py::handle gamma : gammas_) train_.push_back(trains(gamma.ptr()));
}

bool Roster::same(const py::list& param_groups) const {
  if (train_.empty() || param_groups.size() != groups_.size()) return false;
  for (size_t i = 0; i < groups_.size(); ++i) {
    const py::list params = params_of(param_groups[i]);
    const auto& before = groups_[i];
    if (params.size() != before.size()) return false;
    for (size_t j = 0; j < before.size(); ++j) {
      if (PyList_GET_ITEM(params.ptr(), j) != before[j].ptr()) return false;
    }
  }
  for (size_t l = 0; l < train_.size(); ++l) {
    if (trains(PyTuple_GET_ITEM(gammas_.ptr(), l)) != train_[l]) return false;
  }
  return true;
}

}  // namespace polarfast
