#include "qpert/manifest.hpp"

#include <openssl/evp.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <memory>

#include "qpert/error.hpp"
#include "qpert/json.hpp"

namespace qpert {
namespace {

namespace fs = std::filesystem;

constexpr int SCHEMA = 2;
constexpr std::int64_t LONGEST_AXIS = 1 << 20, LARGEST_IMAGE = 1 << 13;  // above: no bundle, and sums could overflow

struct Role {
  std::vector<std::string> inputs, outputs;
  bool required;
};
// runtime/bundle/roles.py
const std::map<std::string, Role> ROLES = {
    {"image_tower", {{"pixels"}, {"image_tokens"}, true}},
    {"query_head", {{"image_tokens"}, {"image_vectors"}, true}},
    {"text_tower", {{"token_ids"}, {"text_vectors"}, true}},
    {"pair_scorer", {{"image_tokens", "token_ids"}, {"pair_scores"}, false}},
    {"preprocess", {{"image"}, {"pixels"}, false}},
    {"boxes", {{"boxes", "image_size"}, {"object_masks", "box_weights"}, false}},
};

Error no_manifest(const std::string& why) {
  return Error("manifest-fields", "manifest.json is not a qpert manifest (" + why + "); export the bundle again");
}

void require(bool condition, const std::string& why) {
  if (!condition) throw no_manifest(why);
}

std::string one_of(const json& object, const char* key, const std::vector<std::string>& known, const char* otherwise) {
  std::string value = object.value(key, otherwise);
  require(std::find(known.begin(), known.end(), value) != known.end(), std::string(key) + " is '" + value + "'");
  return value;
}

std::int64_t whole(const json& object, const char* key, std::int64_t low, std::int64_t high) {
  const json& value = object.at(key);
  require(value.is_number_integer(), std::string(key) + " is no whole number");
  require(!value.is_number_unsigned() || value.get<std::uint64_t>() <= static_cast<std::uint64_t>(high),
          std::string(key) + " is too large");
  auto number = value.get<std::int64_t>();
  require(low <= number && number <= high, std::string(key) + " is " + std::to_string(number));
  return number;
}

Tensor read_tensor(const json& value) {
  Tensor tensor;
  tensor.name = value.at("name").get<std::string>();
  tensor.slot = value.at("slot").get<std::string>();
  tensor.type = type_of(value.at("dtype").get<std::string>());
  for (const json& axis : value.at("shape")) {
    if (axis.is_string()) {
      tensor.shape.push_back(-1);
      tensor.axes.push_back(axis.get<std::string>());
    } else {
      require(axis.is_number_integer() && axis.get<double>() >= 0 && axis.get<double>() <= LONGEST_AXIS,
              tensor.name + " has an axis of impossible length");
      tensor.shape.push_back(axis.get<std::int64_t>());
      tensor.axes.emplace_back();
    }
  }
  require(!tensor.shape.empty() && tensor.shape.size() <= 8, tensor.name + " has no usable shape");
  tensor.shared = value.value("shared", false);
  return tensor;
}

void check_slots(const Graph& graph) {
  auto role = ROLES.find(graph.role);
  if (role == ROLES.end()) return;
  auto check = [&](const std::vector<std::string>& wanted, const std::vector<Tensor>& tensors) {
    for (const auto& slot : wanted) {
      auto count = std::count_if(tensors.begin(), tensors.end(), [&](const Tensor& t) { return t.slot == slot; });
      require(count == 1, "graph " + graph.name + " has " + std::to_string(count) + " tensors of slot " + slot);
    }
  };
  check(role->second.inputs, graph.inputs);
  check(role->second.outputs, graph.outputs);
}

Graph read_graph(const std::string& name, const json& value) {
  Graph graph;
  graph.name = name;
  graph.role = value.at("role").get<std::string>();
  graph.file = value.at("file").get<std::string>();
  for (const json& tensor : value.at("inputs")) graph.inputs.push_back(read_tensor(tensor));
  for (const json& tensor : value.at("outputs")) graph.outputs.push_back(read_tensor(tensor));
  for (const auto& [axis, range] : value.at("ranges").items()) {
    Range made{whole(range, "min", 0, LONGEST_AXIS), whole(range, "max", 0, LONGEST_AXIS)};
    require(made.min <= made.max, "a range goes from " + std::to_string(made.min) + " to " + std::to_string(made.max));
    graph.ranges[axis] = made;
  }
  for (const Tensor& tensor : graph.inputs)
    for (const auto& axis : tensor.axes)
      require(axis.empty() || graph.ranges.count(axis), "graph " + name + " gives no range for the axis " + axis);
  check_slots(graph);
  return graph;
}

ImageGeometry read_image(const json& value) {
  ImageGeometry image;
  image.size = static_cast<int>(whole(value, "size", 1, LARGEST_IMAGE));
  image.resample = one_of(value, "resample", {"bicubic", "bilinear", "lanczos"}, "");
  image.fit = one_of(value, "fit", {"squash", "crop"}, "squash");
  image.rounding = one_of(value, "rounding", {"floor", "half_even"}, "floor");
  if (image.fit == "crop") image.shortest_side = static_cast<int>(whole(value, "shortest_side", image.size, LARGEST_IMAGE));
  auto mean = value.at("mean").get<std::vector<double>>(), std = value.at("std").get<std::vector<double>>();
  require(mean.size() == 3 && std.size() == 3, "mean and std are not three numbers each");
  for (int channel = 0; channel < 3; channel++) {
    require(std[channel] > 1e-6 && std[channel] < 1e6 && std::abs(mean[channel]) < 1e6, "mean or std are no such numbers");
    image.mean[channel] = static_cast<float>(mean[channel]);
    image.std[channel] = static_cast<float>(std[channel]);
  }
  return image;
}

TokenizerSpec read_tokenizer(const json& value) {
  TokenizerSpec spec;
  spec.file = value.at("file").get<std::string>();
  spec.kind = one_of(value, "kind", {"wordpiece", "bpe", "sentencepiece"}, "wordpiece");
  spec.clean = one_of(value, "clean", {"lavis", "tokenizer"}, "lavis");
  spec.pad = one_of(value, "pad", {"longest", "max_length"}, "longest");
  spec.pad_side = one_of(value, "pad_side", {"right", "left"}, "right");
  spec.max_length = whole(value, "max_length", 1, LONGEST_AXIS);
  spec.vocab_size = whole(value, "vocab_size", 1, 1 << 30);
  spec.pad_id = value.contains("pad_id") ? whole(value, "pad_id", 0, spec.vocab_size - 1) : 0;
  return spec;
}

Perturbation read_perturbation(const json& value) {
  Perturbation made;
  made.reduction = one_of(value, "reduction", {"sum", "mean", "each"}, "");
  made.stages = one_of(value, "stages", {"itc", "both", "none"}, "");
  made.keep_stock = value.value("keep_stock", false);
  return made;
}

json parse(const fs::path& folder) {
  fs::path path = folder / "manifest.json";
  if (!fs::is_regular_file(path))
    throw Error("manifest-missing", folder.string() + " holds no manifest.json; expected a folder that `qpert export` made");
  try {
    json values = parse_json(read_file(path, "manifest-unreadable", "the manifest"));
    if (!values.is_object()) throw Error("manifest-type", path.string() + " holds no JSON object; export the bundle again");
    return values;
  } catch (const json::exception& error) {
    throw Error("manifest-unreadable", path.string() + " cannot be read as JSON (" + error.what() + "); export the bundle again");
  }
}

void check_schema(const json& values) {
  auto found = values.find("schema_version");
  if (found == values.end() || !found->is_number_integer() || found->get<double>() < 1)
    throw Error("bundle-schema", "the manifest's schema_version is no number from 1 on; this is not a qpert bundle");
  if (found->get<double>() > SCHEMA)
    throw Error("bundle-schema-newer", "the bundle has schema version " + text_of(*found) + ", this program reads version " +
                                           std::to_string(SCHEMA) + "; build a newer one, or export the bundle again");
  if (found->get<double>() < SCHEMA)
    throw Error("bundle-schema", "the bundle has schema version 1, which has no preprocess.onnx; export it again");
}

std::string sha256(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
  EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr);
  std::vector<char> buffer(1 << 20);
  while (file.read(buffer.data(), buffer.size()), file.gcount() > 0)
    EVP_DigestUpdate(context.get(), buffer.data(), static_cast<std::size_t>(file.gcount()));
  if (file.bad()) throw Error("file-unreadable", "cannot read " + path.string(), unavailable);
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int length = 0;
  EVP_DigestFinal_ex(context.get(), digest, &length);
  std::string text;
  for (unsigned int i = 0; i < length; i++) {
    text += "0123456789abcdef"[digest[i] >> 4];
    text += "0123456789abcdef"[digest[i] & 15];
  }
  return text;
}

const Tensor* of_slot(const std::vector<Tensor>& tensors, const std::string& slot) {
  for (const Tensor& tensor : tensors)
    if (tensor.slot == slot) return &tensor;
  return nullptr;
}

}  // namespace

std::string read_file(const fs::path& path, const std::string& code, const std::string& what) {
  std::error_code error;
  if (!fs::is_regular_file(path, error))
    throw Error(code, path.string() + " does not exist (or is not a regular file); expected " + what);
  std::ifstream file(path, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(file), {}};
  if (!file.is_open() || file.bad()) throw Error(code, path.string() + " cannot be read; check its permissions", unavailable);
  return bytes;
}

bool Graph::takes(const std::string& slot) const { return of_slot(inputs, slot) != nullptr; }

const Tensor& Graph::input(const std::string& slot) const {
  if (const Tensor* found = of_slot(inputs, slot)) return *found;
  throw no_manifest("graph " + name + " has no input of slot " + slot);
}

const Tensor& Graph::output(const std::string& slot) const {
  if (const Tensor* found = of_slot(outputs, slot)) return *found;
  throw no_manifest("graph " + name + " has no output of slot " + slot);
}

std::int64_t Graph::most(const std::string& axis) const {
  auto found = ranges.find(axis);
  require(found != ranges.end() && found->second.max >= 1, "graph " + name + " gives no usable range for the axis " + axis);
  return found->second.max;
}

Manifest Manifest::read(const fs::path& folder) {
  if (!fs::is_directory(folder))
    throw Error("bundle-missing", folder.string() + " is not a folder; expected a bundle made by `qpert export`");
  json values = parse(folder);
  if (values.value("kind", json()) == "detector")
    throw Error("bundle-is-detector", folder.string() + " is a detector, which cannot search; expected a retrieval bundle");
  check_schema(values);
  Manifest manifest;
  manifest.folder = folder;
  try {
    manifest.family = values.at("family").get<std::string>();
    manifest.precision = one_of(values, "precision", {"fp32", "fp16", "bf16", "int8", "fp8"}, "");
    manifest.samples = values.at("samples").get<std::string>();
    for (const auto& [name, graph] : values.at("graphs").items()) manifest.graphs.push_back(read_graph(name, graph));
    manifest.image = read_image(values.at("preprocessing"));
    manifest.tokenizer = read_tokenizer(values.at("tokenizer"));
    manifest.perturbation = read_perturbation(values.at("perturbation"));
    const json& patches = values.at("patches");
    require(patches.is_array() && patches.size() == 2, "patches are not rows and columns");
    json sides = {{"rows", patches[0]}, {"columns", patches[1]}};
    auto cells = whole(sides, "rows", 1, LARGEST_IMAGE) * whole(sides, "columns", 1, LARGEST_IMAGE);
    manifest.image_tokens = cells + whole(values, "prefix_tokens", 0, LONGEST_AXIS);
    const json& scores = values.at("scores");
    require(scores.at("first") == "max_cosine", "the first score is not max_cosine: build a newer program");
    bool sums = scores.at("second") == "logit" && scores.at("final") == "sum";
    require(sums || (scores.at("second").is_null() && scores.at("final") == "first"), "the scores are unknown");
    manifest.files = values.at("files").get<std::map<std::string, std::string>>();
    manifest.check();
    require(sums == (manifest.find("pair_scorer") != nullptr), "the second score and the pair scorer disagree");
  } catch (const json::exception& error) {
    throw no_manifest(error.what());
  }
  return manifest;
}

void Manifest::check() const {
  for (const auto& [name, role] : ROLES) {
    auto count = std::count_if(graphs.begin(), graphs.end(), [&, role_name = name](const Graph& g) { return g.role == role_name; });
    if (count > 1 || (role.required && count == 0))
      throw Error("bundle-roles", "the manifest describes " + std::to_string(count) + " graphs of role " + name +
                                      "; expected one: export the bundle again");
  }
  const Tensor& tokens = graph("image_tower").output("image_tokens");
  if (tokens.shape.size() != 3 || tokens.shape[1] != image_tokens)
    throw Error("bundle-patches", "the image tower gives another number of image tokens than the manifest's patches; "
                                  "export the bundle again");
  std::vector<std::string> used = {samples, tokenizer.file};
  for (const Graph& graph : graphs) used.push_back(graph.file);
  for (const auto& [name, digest] : files) path(name);
  for (const auto& name : used) {
    path(name);
    if (!files.count(name))
      throw Error("manifest-unhashed", "the manifest gives no hash for " + name + "; do not trust this bundle, export it again");
  }
}

const Graph* Manifest::find(const std::string& role) const {
  for (const Graph& graph : graphs)
    if (graph.role == role) return &graph;
  return nullptr;
}

const Graph& Manifest::graph(const std::string& role) const {
  if (const Graph* found = find(role)) return *found;
  throw Error("bundle-role-missing", "this bundle has no graph of role " + role + "; export a model that has one");
}

fs::path Manifest::path(const std::string& name) const {
  fs::path relative(name);
  bool climbs = std::find(relative.begin(), relative.end(), "..") != relative.end();
  if (name.empty() || relative.is_absolute() || climbs || name.find_first_of("\\:\0", 0, 3) != std::string::npos)
    throw Error("bundle-path", "the manifest names '" + name.substr(0, 200) + "', which is outside the bundle " +
                                   folder.string() + "; do not trust this bundle");
  std::error_code error;
  fs::path root = fs::canonical(folder, error), whole = fs::weakly_canonical(folder / relative, error);
  auto [end, _] = std::mismatch(root.begin(), root.end(), whole.begin(), whole.end());
  if (error || end != root.end())
    throw Error("bundle-link", "the manifest names '" + name.substr(0, 200) + "': a link there leads out of the bundle " +
                                   folder.string() + "; do not trust it, or copy the files in their place (cp -rL)");
  return folder / relative;
}

void Manifest::check_files() const {
  for (const auto& [name, digest] : files) {
    if (name.rfind("reports/", 0) == 0) continue;  // nothing runs them
    fs::path file = path(name);
    if (!fs::is_regular_file(file))
      throw Error("bundle-file-missing", file.string() + " is missing from the bundle; copy the whole folder again");
    if (std::string found = sha256(file); found != digest)
      throw Error("bundle-file-altered", file.string() + " was altered: its SHA-256 is " + found + ", the manifest says " +
                                             digest + "; restore the file or export the bundle again");
  }
}

}  // namespace qpert
