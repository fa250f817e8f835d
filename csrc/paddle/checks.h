// What an op demands of its tensors: dtype, device, rank and shape, in this order, sizes tied
// together by name. A failure reads "op: block_tables: wanted int32 [batch_size=4, max_blocks], got
// int64 [4, 17]".
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "paddle/phi/api/ext/op_meta_info.h"

// Versions before 3 have no such type.
#if __has_include("paddle/phi/common/float8_e4m3fn.h")
#define MINICPM41_PADDLE_HAS_FLOAT8
#endif

namespace minicpm41::binding {

inline std::string dtype_name(paddle::DataType dtype) {
  switch (dtype) {
    case paddle::DataType::FLOAT32:
      return "float32";
    case paddle::DataType::FLOAT16:
      return "float16";
    case paddle::DataType::BFLOAT16:
      return "bfloat16";
    case paddle::DataType::FLOAT64:
      return "float64";
    case paddle::DataType::INT32:
      return "int32";
    case paddle::DataType::INT64:
      return "int64";
    case paddle::DataType::UINT8:
      return "uint8";
    case paddle::DataType::INT8:
      return "int8";
#ifdef MINICPM41_PADDLE_HAS_FLOAT8
    case paddle::DataType::FLOAT8_E4M3FN:
      return "float8_e4m3fn";
#endif
    case paddle::DataType::BOOL:
      return "bool";
    default:
      return "dtype " + std::to_string(static_cast<int>(dtype));
  }
}

// A dimension: a number, or a name whose value the first tensor that has it decides.
struct Dim {
  Dim(const char* name) : name(name) {}  // NOLINT: meant to convert
  Dim(int64_t value) : value(value) {}   // NOLINT
  std::string name;
  int64_t value = -1;
};

class Checks {
 public:
  explicit Checks(const char* op) : op_(op) {}

  void tensor(const char* name, const paddle::Tensor& tensor, paddle::DataType dtype,
              const std::vector<Dim>& dims) {
    const std::vector<int64_t> shape = tensor.shape();
    bool ok = tensor.dtype() == dtype && shape.size() == dims.size();
    for (size_t i = 0; ok && i < dims.size(); ++i) ok = shape[i] == wanted(dims[i], shape[i]);
    if (!ok) {
      fail(std::string(name) + ": wanted " + dtype_name(dtype) + " " + describe(dims) + ", got " +
           dtype_name(tensor.dtype()) + " " + describe(shape));
    }
    if (num_tensors_++ == 0) {
      place_ = tensor.place();
      first_name_ = name;
    } else if (tensor.place() != place_) {
      fail(std::string(name) + ": wanted on " + place_.DebugString() + " as " + first_name_ +
           ", got " + tensor.place().DebugString());
    }
    for (size_t i = 0; i < dims.size(); ++i) {
      if (!dims[i].name.empty()) sizes_[dims[i].name] = shape[i];
    }
  }

  // One of the three storage types, which all of an op's caches and activations share.
  paddle::DataType storage_dtype(const char* name, const paddle::Tensor& tensor) {
    const paddle::DataType dtype = tensor.dtype();
    if (dtype != paddle::DataType::FLOAT32 && dtype != paddle::DataType::FLOAT16 &&
        dtype != paddle::DataType::BFLOAT16) {
      fail(std::string(name) + ": wanted float32, float16 or bfloat16, got " + dtype_name(dtype));
    }
    return dtype;
  }

  int32_t size(const char* name) const {
    const int64_t value = sizes_.at(name);
    if (value > INT32_MAX) fail(std::string(name) + ": " + std::to_string(value) + " is too many");
    return static_cast<int32_t>(value);
  }

  [[noreturn]] void fail(const std::string& message) const {
    // Paddle turns this, and no standard exception, into a Python one.
    PD_THROW("minicpm41_" + op_ + ": " + message);
  }

 private:
  int64_t wanted(const Dim& dim, int64_t got) const {
    if (dim.name.empty()) return dim.value;
    const auto known = sizes_.find(dim.name);
    return known == sizes_.end() ? got : known->second;
  }
  std::string describe(const std::vector<Dim>& dims) const {
    std::string text;
    for (const Dim& dim : dims) {
      const auto known = sizes_.find(dim.name);
      text += text.empty() ? "" : ", ";
      text += dim.name.empty()        ? std::to_string(dim.value)
              : known == sizes_.end() ? dim.name
                                      : dim.name + "=" + std::to_string(known->second);
    }
    return "[" + text + "]";
  }
  static std::string describe(const std::vector<int64_t>& shape) {
    std::string text;
    for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return "[" + text + "]";
  }

  std::string op_;
  std::map<std::string, int64_t> sizes_;
  int num_tensors_ = 0;
  phi::Place place_;
  std::string first_name_;
};

}  // namespace minicpm41::binding
