#include "table.h"

#include <limits>

#include "tensors.h"

namespace polarfast {

namespace py = pybind11;
using tensors::Members;
using tensors::read;
using tensors::view_of;

namespace {

// The number of elements, for a contiguous tensor of at most `most`; else -1.
int64_t contiguous_size(const dlpack::View& view, int64_t most) {
  int64_t count = 1;
  for (int32_t d = 0; d < view.dims; ++d) {
    if (view.shape[d] == 0) return 0;
  }
  for (int32_t d = view.dims - 1; d >= 0; --d) {
    if (view.shape[d] == 1) continue;
    if (view.strides[d] != count || view.shape[d] > most / count) return -1;
    count *= view.shape[d];
  }
  return count;
}

ScalarType scalar_type(const dlpack::DataType& dtype) {
  constexpr uint8_t kFloat = 2, kBfloat = 4;
  if (dtype == dlpack::DataType{kFloat, 32, 1}) return ScalarType::Float;
  if (dtype == dlpack::DataType{kFloat, 64, 1}) return ScalarType::Double;
  if (dtype == dlpack::DataType{kFloat, 16, 1}) return ScalarType::Half;
  if (dtype == dlpack::DataType{kBfloat, 16, 1}) return ScalarType::BFloat16;
  throw py::value_error("polarfast: scaling factors must be float32, float16, bfloat16 or float64");
}

// own["momentum_buffer"], or nothing.
py::object momentum_buffer(PyObject* own) {
  static PyObject* key = PyUnicode_InternFromString("momentum_buffer");
  PyObject* buffer = PyDict_Check(own) ? PyDict_GetItemWithError(own, key) : nullptr;
  if (buffer == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return py::reinterpret_borrow<py::object>(buffer == Py_None ? nullptr : buffer);
}

}  // namespace

ScaleRows::ScaleRows(py::tuple params, std::vector<double> weights, std::vector<double> tilts)
    : params_(std::move(params)) {
  if (params_.empty() || weights.size() != params_.size() || tilts.size() != params_.size()) {
    throw py::value_error("polarfast: give one weight and one tilt for each of one or more γ tensors");
  }
  rows_.weights = std::move(weights);
  rows_.tilts = std::move(tilts);
  for (size_t l = 0; l < params_.size(); ++l) {
    row_of_[PyTuple_GET_ITEM(params_.ptr(), l)] = l;
    dlpack::View view;
    const bool found = view_of(PyTuple_GET_ITEM(params_.ptr(), l), &view);
    if (found && l == 0) {
      rows_.dtype = scalar_type(view.dtype);
      dtype_ = view.dtype;
      device_ = view.device;
    }
    rows_.sizes.push_back(found ? contiguous_size(view, std::numeric_limits<int64_t>::max()) : -1);
  }
  rows_.centers.resize(params_.size());
  rows_.gammas.resize(params_.size());
  rows_.grads.resize(params_.size());
  rows_.momenta.resize(params_.size());
}

void ScaleRows::set_centers(std::vector<double> centers) {
  if (centers.size() != params_.size()) throw py::value_error("polarfast: give one center for each row");
  rows_.centers = std::move(centers);
}

void ScaleRows::set(void*& address, void* now) {
  if (address == now) return;
  address = now;
  ++version_;
}

bool ScaleRows::usable(int64_t l, PyObject* tensor, void** now) const {
  dlpack::View view;
  if (!view_of(tensor, &view)) return false;
  const int64_t size = rows_.sizes[l];
  *now = static_cast<char*>(view.data) + view.byte_offset;
  return size >= 0 && view.dtype == dtype_ && view.device == device_ && contiguous_size(view, size) == size &&
      (view.data != nullptr || size == 0) && !tensors::negated(tensor);
}

std::vector<py::object> ScaleRows::buffers(PyObject* state) const {
  std::vector<py::object> found(rows_.count());
  if (state == nullptr) return found;
  // By going through it all: a look-up would hash a tensor, which is a function in Python.
  PyObject *param = nullptr, *own = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &param, &own);) {
    const auto row = row_of_.find(param);
    if (row != row_of_.end()) found[row->second] = momentum_buffer(own);
  }
  return found;
}

bool ScaleRows::read_row(int64_t l, PyObject* buffer) {
  const Members& members = Members::get();
  PyObject* param = PyTuple_GET_ITEM(params_.ptr(), l);
  void *gamma = nullptr, *grad_now = nullptr, *momentum_now = nullptr;
  if (!usable(l, param, &gamma)) return false;
  if (tensors::is_set(members.requires_grad, param)) {
    const py::object grad = read(members.grad, param);
    if (!grad.is_none() && !usable(l, grad.ptr(), &grad_now)) return false;
  }
  if (buffer != nullptr && !usable(l, buffer, &momentum_now)) return false;
  set(rows_.gammas[l], gamma);
  set(rows_.grads[l], grad_now);
  set(rows_.momenta[l], momentum_now);
  return true;
}

int64_t ScaleRows::refresh(const py::object& momentum_of) {
  PyObject* state = momentum_of.is_none() ? nullptr : momentum_of.ptr();
  if (state != nullptr && !PyDict_Check(state)) throw py::type_error("polarfast: momentum_of must be optimizer.state");
  const std::vector<py::object> momenta = buffers(state);
  int64_t with_grad = 0;
  for (int64_t l = 0; l < rows_.count(); ++l) {
    if (!read_row(l, momenta[l].ptr())) return -1 - l;
    if (rows_.grads[l] != nullptr) ++with_grad;
  }
  return with_grad;
}

int64_t ScaleRows::follow() {
  const std::vector<int64_t> found = gammas();
  if (static_cast<int64_t>(found.size()) < rows_.count()) return -1 - static_cast<int64_t>(found.size());
  for (int64_t l = 0; l < rows_.count(); ++l) set(rows_.gammas[l], reinterpret_cast<void*>(found[l]));
  return rows_.count();
}

std::vector<int64_t> ScaleRows::gammas() const {
  std::vector<int64_t> found;
  found.reserve(rows_.count());
  for (int64_t l = 0; l < rows_.count(); ++l) {
    void* now = nullptr;
    if (!usable(l, PyTuple_GET_ITEM(params_.ptr(), l), &now)) break;
    found.push_back(reinterpret_cast<int64_t>(now));
  }
  return found;
}

py::list ScaleRows::moving() const {
  py::list found;
  for (int64_t l = 0; l < rows_.count(); ++l) {
    if (rows_.grads[l] != nullptr) found.append(params_[l]);
  }
  return found;
}

int64_t ScaleRows::without_momentum() const {
  for (int64_t l = 0; l < rows_.count(); ++l) {
    if (rows_.grads[l] != nullptr && rows_.momenta[l] == nullptr) return l;
  }
  return -1;
}

int64_t ScaleRows::buffered() const {
  int64_t count = 0;
  for (int64_t l = 0; l < rows_.count(); ++l) {
    if (rows_.grads[l] != nullptr && rows_.momenta[l] != nullptr) ++count;
  }
  return count;
}

py::list ScaleRows::grads() const {
  py::list found;
  for (const py::handle& param : moving()) found.append(read(Members::get().grad, param.ptr()));
  return found;
}

}  // namespace polarfast
