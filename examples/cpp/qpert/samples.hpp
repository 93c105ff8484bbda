// samples.safetensors: what PyTorch recorded at export, and whether this machine computes the same.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "qpert/array.hpp"
#include "qpert/retriever.hpp"

namespace qpert {

struct Samples {
  std::map<std::string, Array> arrays;  // "<graph>/<case>/in/<name>", "<graph>/<case>/out/<name>", "picture/0/image", …
  std::vector<std::string> captions;

  // Throws Error for what is no safetensors file of an export.
  static Samples read(const Manifest& manifest);
};

// One check: passes where `value` is at most `limit`.
struct Gate {
  std::string name;
  double value = 0, limit = 0;
  bool passes() const { return value <= limit; }  // not for NaN
};

// Every recorded case of every graph in its recorded shape, and pictures, captions and boxes. Names and limits are those
// of `qpert verify --level tensor` (runtime/verification/tolerances.py), which also tries other batch shapes.
std::vector<Gate> verify_samples(Retriever& retriever);

}  // namespace qpert
