// What is used of DLPack's C exchange API (its version 1): where a tensor lies and what it is, in one call.
//
// torch.Tensor offers it as a capsule (__dlpack_c_exchange_api__) since 2.10. The layouts are fixed by the standard,
// https://dmlc.github.io/dlpack/latest/c_api.html.
#pragma once

#include <cstdint>

namespace polarfast::dlpack {

struct Device {
  int32_t type;
  int32_t id;
  bool operator==(const Device&) const = default;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  bool operator==(const DataType&) const = default;
};

// Borrowed: valid as long as the tensor is alive and unchanged.
struct View {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void* unused[3];  // owning conversions
  int (*view_of)(void* py_object, View* out);  // 0, or -1 with a Python exception set
  void* current_stream;
};

}  // namespace polarfast::dlpack
