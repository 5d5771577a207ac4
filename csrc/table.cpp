#include "table.h"

namespace polarfast {

namespace py = pybind11;

namespace {

py::object owned(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// torch.Tensor's own descriptors, called directly: no attribute look-up for each of some 400 reads a step.
struct Members {
  py::object grad, requires_grad, dtype, device, data_ptr, is_contiguous, numel;

  Members() {
    const py::object tensor = py::module_::import("torch").attr("Tensor");
    grad = tensor.attr("grad");
    requires_grad = tensor.attr("requires_grad");
    dtype = tensor.attr("dtype");
    device = tensor.attr("device");
    data_ptr = tensor.attr("data_ptr");
    is_contiguous = tensor.attr("is_contiguous");
    numel = tensor.attr("numel");
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

int64_t integer(const py::object& value) {
  const int64_t number = PyLong_AsLongLong(value.ptr());
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

ScalarType scalar_type(const std::string& name) {
  if (name == "torch.float32") return ScalarType::Float;
  if (name == "torch.float64") return ScalarType::Double;
  if (name == "torch.float16") return ScalarType::Half;
  if (name == "torch.bfloat16") return ScalarType::BFloat16;
  throw py::value_error("polarfast: scaling factors must be float32, float16, bfloat16 or float64, not " + name);
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

ScaleRows::ScaleRows(
    py::tuple params, const std::string& dtype, std::vector<double> weights, std::vector<double> tilts)
    : params_(std::move(params)) {
  const Members& members = Members::get();
  rows_.dtype = scalar_type(dtype);
  rows_.weights = std::move(weights);
  rows_.tilts = std::move(tilts);
  for (const py::handle& param : params_) rows_.sizes.push_back(integer(call(members.numel, param.ptr())));
  dtype_ = read(members.dtype, params_[0].ptr());
  device_ = read(members.device, params_[0].ptr());
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

bool ScaleRows::usable(int64_t l, PyObject* tensor, void* before, void** now) const {
  const Members& members = Members::get();
  try {
    // Layout and memory are looked at every time: a gradient may be another tensor at the same address.
    *now = reinterpret_cast<void*>(integer(call(members.data_ptr, tensor)));
    if (call(members.is_contiguous, tensor).ptr() != Py_True) return false;
    if (*now == before && *now != nullptr) return true;
    const int64_t size = integer(call(members.numel, tensor));
    return size == rows_.sizes[l] && (*now != nullptr || size == 0) &&
        read(members.dtype, tensor).is(dtype_) && read(members.device, tensor).equal(device_);
  } catch (const py::error_already_set& error) {
    // torch refuses the address of a tensor that has no memory of its own (sparse, wrapped, functional).
    if (!error.matches(PyExc_RuntimeError)) throw;
    return false;
  }
}

bool ScaleRows::read_row(int64_t l, PyObject* momentum_of) {
  const Members& members = Members::get();
  PyObject* param = PyTuple_GET_ITEM(params_.ptr(), l);
  void* now = nullptr;
  if (!usable(l, param, rows_.gammas[l], &now)) return false;
  set(rows_.gammas[l], now);

  void* grad_now = nullptr;
  if (read(members.requires_grad, param).ptr() == Py_True) {
    const py::object grad = read(members.grad, param);
    if (!grad.is_none() && !usable(l, grad.ptr(), rows_.grads[l], &grad_now)) return false;
  }
  set(rows_.grads[l], grad_now);

  void* momentum_now = nullptr;
  if (momentum_of != nullptr) {
    PyObject* buffer = momentum_buffer(momentum_of, param);
    if (buffer != nullptr && !usable(l, buffer, rows_.momenta[l], &momentum_now)) return false;
  }
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

std::vector<int64_t> ScaleRows::gammas() const {
  std::vector<int64_t> found;
  for (int64_t l = 0; l < rows_.count(); ++l) {
    void* now = nullptr;
    if (!usable(l, PyTuple_GET_ITEM(params_.ptr(), l), nullptr, &now)) break;
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

py::list ScaleRows::grads() const {
  py::list found;
  for (const py::handle& param : moving()) found.append(read(Members::get().grad, param.ptr()));
  return found;
}

}  // namespace polarfast
