// polarfast._C: the pointer table and what a bug report needs. The ops on tensors register themselves (schemas.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include "simd.h"
#include "table.h"

namespace py = pybind11;
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "How this extension was built, and the SIMD level it runs at.");

  py::class_<ScaleRows>(m, "ScaleRows")
      .def(py::init<py::tuple, const std::string&, std::vector<double>>())
      .def("refresh", &ScaleRows::refresh)
      .def("moving", &ScaleRows::moving)
      .def("grads", &ScaleRows::grads)
      .def("without_momentum", &ScaleRows::without_momentum)
      .def_property_readonly("version", &ScaleRows::version)
      .def_property_readonly(
          "addresses",
          [](const ScaleRows& table) {
            std::vector<std::vector<int64_t>> found;
            for (const auto* row : {&table.rows().gammas, &table.rows().grads, &table.rows().momenta}) {
              std::vector<int64_t>& numbers = found.emplace_back();
              for (void* address : *row) numbers.push_back(reinterpret_cast<int64_t>(address));
            }
            return found;
          })
      .def(
          "add_subgradient_",
          [](const ScaleRows& table, int64_t kind, double lam, double t, bool per_layer, double grad_scale) {
            polarfast::add_subgradient(table.rows(), polarfast::penalty_of(kind, lam, t, per_layer), grad_scale);
          })
      .def("clamp_", [](const ScaleRows& table, double upper) { polarfast::clamp(table.rows(), upper); })
      .def(
          "sgd_step_",
          [](const ScaleRows& table,
             int64_t kind,
             double lam,
             double t,
             bool per_layer,
             double lr,
             double momentum,
             double dampening,
             double weight_decay,
             bool nesterov,
             bool maximize,
             std::optional<double> upper,
             bool first_step,
             double grad_scale) {
            polarfast::sgd_step(
                table.rows(),
                polarfast::penalty_of(kind, lam, t, per_layer),
                {lr, momentum, dampening, weight_decay, nesterov, maximize, upper, first_step, grad_scale});
          })
      .def("valley", [](const ScaleRows& table, int64_t summary, int64_t counts) {
        polarfast::valley(table.rows(), reinterpret_cast<double*>(summary), reinterpret_cast<int64_t*>(counts));
      });
}
