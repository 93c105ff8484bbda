#include "qpert/samples.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <set>

#include "qpert/error.hpp"
#include "qpert/json.hpp"
#include "qpert/pixels.hpp"

namespace qpert {
namespace {


constexpr double INFINITE = std::numeric_limits<double>::infinity();
constexpr double HOST_LIMIT = 1e-5;  // float32 rounding of pixels, shares and weights

// The limits of one precision; `features` and `embeds` are not judged below float32.
struct Tolerance {
  std::optional<double> features, embeds;
  double cosine, itm, cosine_with_boxes;
};
const std::map<std::string, Tolerance> TOLERANCES = {
    {"fp32", {1e-4, 2e-5, 1e-6, 2e-5, 1e-6}},
    {"fp16", {std::nullopt, std::nullopt, 1e-4, 2e-2, 1e-3}},
    {"bf16", {std::nullopt, std::nullopt, 1e-3, 2e-1, 1e-2}},
    {"int8", {std::nullopt, std::nullopt, 2e-2, 5e-1, 5e-2}},
    {"fp8", {std::nullopt, std::nullopt, 5e-2, 1.0, 1e-1}},
};

Error unreadable(const Manifest& manifest, const std::string& why) {
  return Error("samples-unreadable", manifest.path(manifest.samples).string() + " cannot be read as recorded samples (" + why +
                                         "); export the bundle again");
}

// The larger; NaN stays.
double worse(double a, double b) { return std::isnan(a) || a > b ? a : b; }

double max_abs(const Array& got, const Array& expected) {
  if (got.shape != expected.shape) return INFINITE;
  const auto a = as_doubles(got), b = as_doubles(expected);
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); i++) worst = worse(std::fabs(a[i] - b[i]), worst);
  return worst;
}

// The largest 1 - cosine of rows of the last axis.
double cosine_distance(const Array& got, const Array& expected) {
  if (got.shape != expected.shape) return INFINITE;
  const auto a = as_doubles(got), b = as_doubles(expected);
  const std::size_t width = std::max<std::size_t>(1, std::size_t(got.shape.back()));
  double worst = -INFINITE;
  for (std::size_t row = 0; row + width <= a.size(); row += width) {
    double ab = 0, aa = 0, bb = 0;
    for (std::size_t i = row; i < row + width; i++) ab += a[i] * b[i], aa += a[i] * a[i], bb += b[i] * b[i];
    worst = worse(1 - ab / std::max(std::sqrt(aa) * std::sqrt(bb), std::numeric_limits<double>::min()), worst);
  }
  return worst;
}

double not_finite(const Array& array) {
  const auto values = as_doubles(array);
  return double(std::count_if(values.begin(), values.end(), [](double v) { return !std::isfinite(v); }));
}

class Verification {
 public:
  explicit Verification(Retriever& retriever)
      : retriever_(retriever), manifest_(retriever.manifest()), samples_(Samples::read(manifest_)) {}

  std::vector<Gate> gates() {
    for (const Graph& graph : manifest_.graphs)
      if (graph.role != "preprocess" && graph.role != "boxes") cases(graph);
    pictures();
    captions();
    boxes();
    return std::move(gates_);
  }

 private:
  const Array& array(const std::string& key) const {
    const auto found = samples_.arrays.find(key);
    if (found == samples_.arrays.end()) throw unreadable(manifest_, "it has no " + key);
    return found->second;
  }

  std::set<std::string> names(const std::string& prefix, const std::string& inside) const {
    std::set<std::string> found;
    for (const auto& [key, value] : samples_.arrays) {
      const auto place = key.find(inside, prefix.size());
      if (key.rfind(prefix, 0) == 0 && place != std::string::npos) found.insert(key.substr(0, place));
    }
    return found;
  }

  void cases(const Graph& graph) {
    const Tolerance& limits = TOLERANCES.at(manifest_.precision);
    double largest = 0, stock = -INFINITE, boxed = -INFINITE, bad = 0;
    const auto found = names(graph.name + "/", "/out/");
    if (found.empty())
      throw Error("case-missing", "graph " + graph.name + " has no recorded case to verify it with; export the bundle again");
    for (const auto& name : found) {
      std::map<std::string, Array> given;
      Slots slots;
      bool perturbed = false;
      for (const Tensor& tensor : graph.inputs) {
        given[tensor.slot] = converted(array(name + "/in/" + tensor.name), tensor.type);
        slots[tensor.slot] = &given[tensor.slot];
        if (tensor.slot == "box_weights") {
          const auto weights = as_doubles(given[tensor.slot]);
          perturbed = std::any_of(weights.begin(), weights.end(), [](double weight) { return weight != 0; });
        }
      }
      const Outputs outputs = retriever_.session(graph.role).run(slots);
      for (const Tensor& tensor : graph.outputs) {
        const Array &got = outputs.at(tensor.slot), expected = converted(array(name + "/out/" + tensor.name), tensor.type);
        largest = worse(max_abs(got, expected), largest);
        double& angle = perturbed ? boxed : stock;
        angle = worse(cosine_distance(got, expected), angle);
        bad += not_finite(got);
      }
    }
    const bool pairs = graph.role == "pair_scorer";
    const auto limit = graph.role == "image_tower" ? limits.features : pairs ? std::optional(limits.itm) : limits.embeds;
    if (limit) gates_.push_back({graph.name + ": max abs difference", largest, *limit});
    if (!pairs && stock != -INFINITE) gates_.push_back({graph.name + ": 1 - cosine", stock, limits.cosine});
    if (!pairs && boxed != -INFINITE) gates_.push_back({graph.name + ": 1 - cosine, with boxes", boxed, limits.cosine_with_boxes});
    gates_.push_back({graph.name + ": values not finite", bad, 0});
  }

  void pictures() {
    const bool native = has_native_pixels(manifest_.image);
    double by_graph = 0, natively = 0;
    for (const auto& name : names("picture/", "/image")) {
      const Array &image = array(name + "/image"), &recorded = array(name + "/pixel_values");
      if (image.type != Type::u8 || image.shape.size() != 3 || image.shape[2] != 3 || image.count() == 0)
        throw unreadable(manifest_, name + " is no picture");
      Array expected = recorded;
      expected.shape.insert(expected.shape.begin(), 1);
      by_graph = worse(max_abs(retriever_.session("preprocess").run({{"image", &image}}).at("pixels"), expected), by_graph);
      const Picture picture{int(image.shape[1]), int(image.shape[0]), image.bytes};
      if (native) natively = worse(max_abs(native_pixels(picture, manifest_.image), expected), natively);
    }
    if (native) gates_.push_back({"preprocessing: max abs difference", natively, HOST_LIMIT});
    gates_.push_back({"preprocess graph: max abs difference", by_graph, HOST_LIMIT});
  }

  void captions() {
    double different = 0;
    for (std::size_t i = 0; i < samples_.captions.size(); i++) {
      const Array& expected = array("caption/" + std::to_string(i) + "/input_ids");
      const Array ids = retriever_.tokenizer().encode(std::vector<std::string>{samples_.captions[i]}).input_ids;
      different += expected.type != Type::i64 || ids.bytes != expected.bytes;
    }
    gates_.push_back({"tokenizer: captions with other ids", different, 0});
  }

  void boxes() {
    if (!manifest_.find("boxes")) return;
    double masks = 0, weights = 0;
    for (const auto& name : names("boxes/", "/xyxy")) {
      Array corners = converted(array(name + "/xyxy"), Type::f32), size = converted(array(name + "/size"), Type::f32);
      for (Array* one : {&corners, &size}) one->shape.insert(one->shape.begin(), 1);
      Outputs made = retriever_.session("boxes").run({{"boxes", &corners}, {"image_size", &size}});
      Array expected_masks = array(name + "/masks"), expected_weights = array(name + "/weights");
      for (Array* one : {&expected_masks, &expected_weights}) one->shape.insert(one->shape.begin(), 1);
      masks = worse(max_abs(made.at("object_masks"), expected_masks), masks);
      weights = worse(max_abs(made.at("box_weights"), expected_weights), weights);
    }
    gates_.push_back({"boxes graph: masks, max abs difference", masks, HOST_LIMIT});
    gates_.push_back({"boxes graph: weights, max abs difference", weights, HOST_LIMIT});
  }

  Retriever& retriever_;
  const Manifest& manifest_;
  Samples samples_;
  std::vector<Gate> gates_;
};

// One tensor of a safetensors file, whose numbers start at `data`.
Array read_tensor(const json& entry, const std::string& bytes, std::size_t data) {
  static const std::map<std::string, Type> TYPES = {
      {"U8", Type::u8}, {"I64", Type::i64}, {"F16", Type::f16}, {"F32", Type::f32}, {"F64", Type::f64}};
  const auto type = TYPES.at(entry.at("dtype").get<std::string>());
  const auto shape = entry.at("shape").get<std::vector<std::uint64_t>>();
  const auto offsets = entry.at("data_offsets").get<std::vector<std::uint64_t>>();
  std::size_t length = size_of(type);
  for (auto axis : shape) {
    if (axis > bytes.size()) throw std::out_of_range("a tensor is larger than the file");
    length *= axis;
    if (length > bytes.size()) throw std::out_of_range("a tensor is larger than the file");
  }
  if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > bytes.size() - data || offsets[1] - offsets[0] != length)
    throw std::out_of_range("a tensor's offsets are impossible");
  Array array(type, {shape.begin(), shape.end()});
  std::copy_n(bytes.begin() + std::ptrdiff_t(data + offsets[0]), length, array.bytes.begin());
  return array;
}

}  // namespace

Samples Samples::read(const Manifest& manifest) {
  const std::string bytes = read_file(manifest.path(manifest.samples), "samples-unreadable", "recorded samples");
  Samples samples;
  try {
    std::uint64_t length = 0;
    if (bytes.size() >= 8)
      for (int i = 7; i >= 0; i--) length = length << 8 | static_cast<std::uint8_t>(bytes[i]);
    if (bytes.size() < 8 || length > bytes.size() - 8) throw std::out_of_range("its header is longer than the file");
    const json header = parse_json(bytes.substr(8, length));
    for (const auto& [key, entry] : header.items())
      if (key != "__metadata__") samples.arrays[key] = read_tensor(entry, bytes, 8 + length);
    samples.captions = parse_json(header.at("__metadata__").at("captions").get<std::string>()).get<std::vector<std::string>>();
  } catch (const json::exception& error) {
    throw unreadable(manifest, error.what());
  } catch (const std::out_of_range& error) {
    throw unreadable(manifest, error.what());
  }
  return samples;
}

std::vector<Gate> verify_samples(Retriever& retriever) { return Verification(retriever).gates(); }

}  // namespace qpert
