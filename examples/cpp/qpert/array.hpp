// A tensor on the host: what goes into graphs and comes out of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace qpert {

enum class Type { u8, i64, f16, f32, f64 };

std::size_t size_of(Type type);
Type type_of(const std::string& dtype);  // NumPy's name; throws Error for another

struct Array {
  Type type = Type::f32;
  std::vector<std::int64_t> shape;
  std::vector<std::uint8_t> bytes;  // row by row; operator new aligns them for every type

  Array() = default;
  Array(Type type, std::vector<std::int64_t> shape) : type(type), shape(std::move(shape)) {
    bytes.resize(count() * size_of(type));
  }

  std::size_t count() const {
    std::size_t n = 1;
    for (auto length : shape) n *= static_cast<std::size_t>(length);
    return n;
  }
  std::size_t row_bytes() const { return shape.empty() || shape[0] == 0 ? 0 : bytes.size() / shape[0]; }

  template <class T>
  T* data() {
    return reinterpret_cast<T*>(bytes.data());
  }
  template <class T>
  const T* data() const {
    return reinterpret_cast<const T*>(bytes.data());
  }
};

// The values as float32 or float16, rounded to nearest; for what was recorded in another precision than a graph takes.
Array converted(const Array& array, Type type);
std::vector<double> as_doubles(const Array& array);

}  // namespace qpert
