#include "table.h"

#include <limits>

namespace polarfast {

namespace py = pybind11;

namespace {

py::object owned(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// torch.Tensor's own descriptors, called directly: no attribute look-up for each of some 400 reads a step.
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

py::object read(const py::object& descriptor, PyObject* tensor) {
  return owned(Py_TYPE(descriptor.ptr())
                   ->tp_descr_get(descriptor.ptr(), tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor))));
}

py::object call(const py::object& method, PyObject* tensor) {
  return owned(PyObject_Vectorcall(method.ptr(), &tensor, 1, nullptr));
}

// Where a tensor lies and what it is; false where torch has no such answer: a tensor without memory of its own (sparse,
// wrapped, functional, meta), or no tensor at all.
bool view_of(PyObject* tensor, dlpack::View* found) {
  if (Members::get().dlpack->view_of(tensor, found) == 0) return true;
  PyErr_Clear();
  return false;
}

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

// state[param]["momentum_buffer"], or null. Nothing is inserted, though optimizer.state is a defaultdict.
PyObject* momentum_buffer(PyObject* state, PyObject* param) {
  PyObject* own = PyDict_GetItemWithError(state, param);
  if (own == nullptr || !PyDict_Check(own)) {
    if (PyErr_Occurred()) throw py::error_already_set();
    return nullptr;
  }
  static PyObject* key = PyUnicode_InternFromString("momentum_buffer");
  PyObject* buffer = PyDict_GetItemWithError(own, key);
  if (buffer == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return buffer == Py_None ? nullptr : buffer;
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
      (view.data != nullptr || size == 0) && call(Members::get().is_neg, tensor).ptr() == Py_False;
}

bool ScaleRows::read_row(int64_t l, PyObject* momentum_of) {
  const Members& members = Members::get();
  PyObject* param = PyTuple_GET_ITEM(params_.ptr(), l);
  void *gamma = nullptr, *grad_now = nullptr, *momentum_now = nullptr;
  if (!usable(l, param, &gamma)) return false;
  if (read(members.requires_grad, param).ptr() == Py_True) {
    const py::object grad = read(members.grad, param);
    if (!grad.is_none() && !usable(l, grad.ptr(), &grad_now)) return false;
  }
  if (momentum_of != nullptr) {
    PyObject* buffer = momentum_buffer(momentum_of, param);
    if (buffer != nullptr && !usable(l, buffer, &momentum_now)) return false;
  }
  set(rows_.gammas[l], gamma);
  set(rows_.grads[l], grad_now);
  set(rows_.momenta[l], momentum_now);
  return true;
}

int64_t ScaleRows::refresh(const py::object& momentum_of) {
  PyObject* state = momentum_of.is_none() ? nullptr : momentum_of.ptr();
  if (state != nullptr && !PyDict_Check(state)) throw py::type_error("polarfast: momentum_of must be optimizer.state");
  int64_t with_grad = 0;
  for (int64_t l = 0; l < rows_.count(); ++l) {
    if (!read_row(l, state)) return -1 - l;
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
