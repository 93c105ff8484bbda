// A bundle behind four calls: pictures and texts to features, features to scores. As qpert.runtime.Retriever.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "qpert/boxes.hpp"
#include "qpert/manifest.hpp"
#include "qpert/picture.hpp"
#include "qpert/sessions.hpp"
#include "qpert/tokenizer.hpp"

namespace qpert {

// What is kept of one picture. `vectors` float32 [R,Q,E]: R query sets, one, or with reduction "each" one for every box
// (after the stock set, where the bundle keeps it). `masks` and `weights` where the pair scorer takes boxes, too.
struct ImageFeatures {
  Array image_tokens;  // [1,N,C]
  Array vectors;
  std::optional<Array> masks, weights;  // [1,O,N], [1,O]
};

struct Settings {
  std::string onnxruntime;    // see Runtime
  int threads = 0;            // of one operator; 0 leaves them to ONNX Runtime
  bool check_files = true;    // hash every file of the bundle first
  bool native_pixels = true;  // make pixels natively; false runs preprocess.onnx
};

class Retriever {
 public:
  Retriever(const std::filesystem::path& bundle, const Settings& settings = {});

  const Manifest& manifest() const { return *manifest_; }
  const Runtime& runtime() const { return *runtime_; }
  const Tokenizer& tokenizer() const { return tokenizer_; }
  bool reranks() const { return manifest_->find("pair_scorer") != nullptr; }

  // The session of a role; opened when it is first asked for.
  const Session& session(const std::string& role);

  // float32 [1,3,S,S]. `name` is for messages.
  Array pixels(const Picture& picture, const std::string& name = "the picture");

  // `boxes` in pixels of the picture, checked and clipped (see `clipped`).
  ImageFeatures encode_image(const Picture& picture, const std::vector<Box>& boxes = {}, const std::string& name = "the picture");

  // float32 [T,E].
  Array encode_texts(const std::vector<std::string>& texts);

  // For every text, the best of the picture's queries: max of vectors · text.
  std::vector<double> itc(const ImageFeatures& image, const Array& texts) const;

  // For every text, the match logit. Throws Error where the bundle has no pair scorer.
  std::vector<double> itm(const ImageFeatures& image, const std::vector<std::string>& texts);

 private:
  Array encode_sets(const Array& image_tokens, const Array& masks, const Array& weights);

  std::unique_ptr<Manifest> manifest_;  // graphs are referred to by address
  std::unique_ptr<Runtime> runtime_;
  Tokenizer tokenizer_;
  std::map<std::string, Session> sessions_;
  Settings settings_;
  bool warned_ = false;
};

}  // namespace qpert
