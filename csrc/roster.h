// Which parameters an optimizer holds, and which γ train: whether any of it has changed, at a comparison for each.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace polarfast {

class Roster {
 public:
  explicit Roster(pybind11::tuple gammas) : gammas_(std::move(gammas)) {}

  // Keeps requires_grad of each γ, and the parameters of each group of `optimizer.param_groups`.
  void remember(const pybind11::list& param_groups);
  // Whether all is as it was when remembered; false before that.
  bool same(const pybind11::list& param_groups) const;

 private:
  pybind11::tuple gammas_;
  std::vector<bool> train_;
  std::vector<std::vector<pybind11::object>> groups_;  // kept alive: another object may get the address of a dead one
};

}  // namespace polarfast
