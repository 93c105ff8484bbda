// ONNX Runtime, opened when the program runs: one program for every libonnxruntime of API 21 (1.21) or later.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "qpert/array.hpp"
#include "qpert/manifest.hpp"

namespace qpert {

using Slots = std::map<std::string, const Array*>;  // inputs by what they mean
using Outputs = std::map<std::string, Array>;

class Runtime {
 public:
  // `path`: the library, or a folder that holds it (`onnxruntime/capi` of the Python wheel). Empty: $QPERT_ONNXRUNTIME,
  // else what the dynamic linker finds. Throws Error where there is none, or an older one. The first library that is
  // opened serves the whole process.
  explicit Runtime(const std::string& path = "");
  ~Runtime();
  Runtime(Runtime&&) noexcept;

  const std::string& version() const;
  const std::string& library() const;

 private:
  friend class Session;
  struct State;
  std::shared_ptr<State> state_;
};

// One graph of a bundle on the CPU.
class Session {
 public:
  // `threads` of one operator; 0 leaves them to ONNX Runtime.
  Session(const Runtime& runtime, const Manifest& manifest, const Graph& graph, int threads = 0);
  ~Session();
  Session(Session&&) noexcept;

  const Graph& graph() const { return *graph_; }

  // Outputs by slot. Slots that the graph does not take are left out. Throws Error for an input that is missing, of
  // another type, or of another shape than the manifest declares.
  Outputs run(const Slots& inputs) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
  const Graph* graph_;
};

}  // namespace qpert
