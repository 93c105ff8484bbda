// manifest.json of a bundle, schema 2: read strictly, because everything else believes it.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "qpert/array.hpp"

namespace qpert {

// One input or output. `slot` is what it means ("pixels"); `axes` has the name of each axis of varying length, whose
// entry in `shape` is -1. `shared`: the first axis may have length 1, and that row serves all rows of other inputs.
struct Tensor {
  std::string name, slot;
  Type type = Type::f32;
  std::vector<std::int64_t> shape;
  std::vector<std::string> axes;
  bool shared = false;
};

struct Range {
  std::int64_t min = 0, max = 0;
};

struct Graph {
  std::string name, role, file;
  std::vector<Tensor> inputs, outputs;
  std::map<std::string, Range> ranges;

  bool takes(const std::string& slot) const;
  const Tensor& input(const std::string& slot) const;
  const Tensor& output(const std::string& slot) const;
  std::int64_t most(const std::string& axis) const;  // the longest that an axis may be in one call
};

// How a picture becomes pixel_values [1,3,size,size].
struct ImageGeometry {
  int size = 0, shortest_side = 0;
  std::array<float, 3> mean{}, std{};
  std::string resample, fit, rounding;
};

struct TokenizerSpec {
  std::string file, kind, clean, pad, pad_side;
  std::int64_t max_length = 0, vocab_size = 0, pad_id = 0;
};

// The part of the perturbation that the host decides, besides what boxes.onnx holds.
struct Perturbation {
  std::string reduction, stages;
  bool keep_stock = false;
  bool splits_boxes() const { return reduction == "each" && stages != "none"; }
};

class Manifest {
 public:
  std::filesystem::path folder;
  std::string family, precision, samples;
  std::vector<Graph> graphs;
  ImageGeometry image;
  TokenizerSpec tokenizer;
  Perturbation perturbation;
  std::int64_t image_tokens = 0;
  std::map<std::string, std::string> files;  // path → SHA-256

  // Throws Error for what is no manifest, of another schema, or names files outside the bundle.
  static Manifest read(const std::filesystem::path& folder);

  const Graph* find(const std::string& role) const;
  const Graph& graph(const std::string& role) const;  // throws Error where there is none
  std::filesystem::path path(const std::string& name) const;

  // Throws Error for the first file that is missing, or that is not the one that was exported (SHA-256).
  void check_files() const;

 private:
  void check() const;
};

// The whole of a regular file. `code` and `what` are for the error where it cannot be read.
std::string read_file(const std::filesystem::path& path, const std::string& code, const std::string& what);

}  // namespace qpert
