// The pointer table: addresses of γ, their gradients and momentum buffers, read from the Python objects.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <unordered_map>
#include <vector>

#include "dlpack.h"
#include "rows.h"

namespace polarfast {

// Passing three lists of 53 tensors through the dispatcher costs more than the arithmetic on them. This keeps their
// addresses and re-reads them at each step through the descriptors of torch.Tensor (public, the same in every torch).
class ScaleRows {
 public:
  // One that cannot be used as it stands is refused by `refresh`.
  ScaleRows(pybind11::tuple params, std::vector<double> weights, std::vector<double> tilts);

  // Re-reads every address; `momentum_of` is optimizer.state or None. Returns the number of rows with a gradient, or
  // -1 - l if row l cannot be used as it stands: the caller finds out why and says so.
  int64_t refresh(const pybind11::object& momentum_of);

  // The γ that have a gradient, and those gradients.
  pybind11::list moving() const;
  pybind11::list grads() const;
  // The first row that has a gradient and no momentum buffer; -1: there is none.
  int64_t without_momentum() const;
  // How many rows have both.
  int64_t buffered() const;

  // Re-reads the addresses of the γ alone, after whoever may have put other memory behind them. As `refresh`: -1 - l if
  // row l cannot be used, and then no address has changed.
  int64_t follow();

  // The addresses of all γ, read now and not kept: whoever looks at γ disturbs no step, from whatever thread. Shorter
  // than the table if a row cannot be used: as long as the rows before it.
  std::vector<int64_t> gammas() const;

  // What Kind::centered compares the γ of each row with.
  void set_centers(std::vector<double> centers);

  const Rows& rows() const { return rows_; }
  // Counts the refreshes that found another address than before.
  int64_t version() const { return version_; }

 private:
  // Whether a tensor can be row l as it is now, with its address in `now`. Nothing is remembered of it: the allocator
  // may put another tensor, of another size, where one was.
  bool usable(int64_t l, PyObject* tensor, void** now) const;
  // state[γ]["momentum_buffer"] of each row, or nothing. Nothing is inserted, though optimizer.state is a defaultdict.
  std::vector<pybind11::object> buffers(PyObject* state) const;
  bool read_row(int64_t l, PyObject* buffer);
  void set(void*& address, void* now);

  pybind11::tuple params_;
  std::unordered_map<PyObject*, int64_t> row_of_;
  dlpack::DataType dtype_{};
  dlpack::Device device_{};
  Rows rows_;
  int64_t version_ = 0;
};

}  // namespace polarfast
