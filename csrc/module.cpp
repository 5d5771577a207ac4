// polarfast._C: the pointer table, the roster, and what a bug report needs. The ops on tensors register themselves
// (schemas.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "torch_target.h"

#include <torch/headeronly/version.h>

#include <optional>
#include <string>
#include <tuple>

#include "roster.h"
#include "simd.h"
#include "table.h"

namespace py = pybind11;
using polarfast::Roster;
using polarfast::ScaleRows;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = POLARFAST_COMPILER;
  info["flags"] = POLARFAST_FLAGS;
  info["torch"] = POLARFAST_TORCH;
  info["torch_target"] = "2.10";
  info["simd"] = polarfast::simd_name(polarfast::simd_level());
  return info;
}

// Penalty and SgdStep of polarfast/kernels/table.py: named tuples.
using PenaltyTuple = std::tuple<int64_t, double, double, bool, bool, bool>;
using SgdTuple = std::tuple<double, double, double, double, bool, bool, std::optional<double>, bool>;

polarfast::Penalty penalty_of(const PenaltyTuple& given) {
  const auto [kind, lam, t, per_layer, weighted, through] = given;
  if (kind < 0 || kind > 4) throw py::value_error("polarfast: no regularizer has the kind " + std::to_string(kind));
  return {static_cast<polarfast::Kind>(kind), lam, t, per_layer, weighted, through};
}

polarfast::Sgd sgd_of(const SgdTuple& given, double grad_scale) {
  const auto [lr, momentum, dampening, weight_decay, nesterov, maximize, upper, first_step] = given;
  return {lr, momentum, dampening, weight_decay, nesterov, maximize, upper, first_step, grad_scale};
}

py::bytearray zeros(int64_t bytes) {
  PyObject* made = PyByteArray_FromStringAndSize(nullptr, bytes);
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::bytearray>(made);
}

// The addresses of all γ, gradients and momentum buffers, to memory for 3·L numbers: a list of them for Python takes
// longer to make than all else that is sent to a device.
void write_addresses(const ScaleRows& table, int64_t memory) {
  auto* next = reinterpret_cast<int64_t*>(memory);
  for (const auto* row : {&table.rows().gammas, &table.rows().grads, &table.rows().momenta}) {
    for (void* address : *row) *next++ = reinterpret_cast<int64_t>(address);
  }
}

// The addresses and what lies there are read in one call, hence of one moment: other threads of Python wait for it. How
// many rows could be used; if that is all of them, their summary and counts.
std::tuple<int64_t, py::bytearray, py::bytearray> valley(const ScaleRows& table) {
  const std::vector<int64_t> gammas = table.gammas();
  const int64_t usable = static_cast<int64_t>(gammas.size());
  if (usable < table.rows().count()) return {usable, zeros(0), zeros(0)};
  py::bytearray summary = zeros(usable * 3 * sizeof(double)), counts = zeros(usable * 100 * sizeof(int64_t));
  polarfast::valley(
      table.rows(), gammas, reinterpret_cast<double*>(PyByteArray_AS_STRING(summary.ptr())),
      reinterpret_cast<int64_t*>(PyByteArray_AS_STRING(counts.ptr())));
  return {usable, summary, counts};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "How this extension was built, and the SIMD level it runs at.");

  py::class_<ScaleRows>(m, "ScaleRows")
      .def(py::init<py::tuple, std::vector<double>, std::vector<double>>())
      .def("refresh", &ScaleRows::refresh)
      .def("moving", &ScaleRows::moving)
      .def("grads", &ScaleRows::grads)
      .def("without_momentum", &ScaleRows::without_momentum)
      .def("buffered", &ScaleRows::buffered)
      .def_property_readonly("version", &ScaleRows::version)
      .def("write_addresses", &write_addresses)
      .def("gammas", &ScaleRows::gammas)
      .def("follow", &ScaleRows::follow)
      .def("set_centers", &ScaleRows::set_centers)
      .def(
          "add_subgradient_",
          [](const ScaleRows& table, const PenaltyTuple& penalty, double grad_scale) {
            polarfast::add_subgradient(table.rows(), penalty_of(penalty), grad_scale);
          })
      .def("clamp_", [](const ScaleRows& table, double upper) { polarfast::clamp(table.rows(), upper); })
      .def(
          "sgd_step_",
          [](const ScaleRows& table, const PenaltyTuple& penalty, const SgdTuple& sgd, double grad_scale) {
            polarfast::sgd_step(table.rows(), penalty_of(penalty), sgd_of(sgd, grad_scale));
          })
      .def("valley", &valley);

  py::class_<Roster>(m, "Roster")
      .def(py::init<py::tuple>())
      .def("remember", &Roster::remember)
      .def("same", &Roster::same);
}
