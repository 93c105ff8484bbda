#include "qpert/sessions.hpp"

#include <dlfcn.h>

// The library's entry point is looked up, not linked: a linked one is tied to the version it was built with.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <optional>

#include "qpert/error.hpp"

namespace qpert {
namespace fs = std::filesystem;

void warn(const std::string& message) { std::cerr << "warning: " << message << "\n"; }

std::size_t size_of(Type type) {
  switch (type) {
    case Type::u8: return 1;
    case Type::f16: return 2;
    case Type::f32: return 4;
    default: return 8;
  }
}

Type type_of(const std::string& dtype) {
  static const std::map<std::string, Type> TYPES = {
      {"uint8", Type::u8}, {"int64", Type::i64}, {"float16", Type::f16}, {"float32", Type::f32}, {"float64", Type::f64}};
  auto found = TYPES.find(dtype);
  if (found == TYPES.end()) throw Error("manifest-fields", "the manifest has the dtype " + dtype + ", which this program does not know");
  return found->second;
}

std::vector<double> as_doubles(const Array& array) {
  std::vector<double> values(array.count());
  for (std::size_t i = 0; i < values.size(); i++) switch (array.type) {
      case Type::u8: values[i] = array.data<std::uint8_t>()[i]; break;
      case Type::i64: values[i] = double(array.data<std::int64_t>()[i]); break;
      case Type::f16: values[i] = array.data<Ort::Float16_t>()[i].ToFloat(); break;
      case Type::f32: values[i] = array.data<float>()[i]; break;
      case Type::f64: values[i] = array.data<double>()[i]; break;
    }
  return values;
}

Array converted(const Array& array, Type type) {
  if (array.type == type) return array;
  if (type != Type::f32 && type != Type::f16) throw Error("array-type", "only float32 and float16 are converted to");
  Array made(type, array.shape);
  const auto values = as_doubles(array);
  for (std::size_t i = 0; i < values.size(); i++) {
    if (type == Type::f32)
      made.data<float>()[i] = float(values[i]);
    else
      made.data<Ort::Float16_t>()[i] = Ort::Float16_t(float(values[i]));
  }
  return made;
}

struct Runtime::State {
  std::string version, library;
  std::optional<Ort::Env> environment;
};

namespace {

// The library's file: the path itself, or the first of its name in a folder.
std::string library_file(const std::string& path) {
  if (!fs::is_directory(path)) return path;
  std::vector<std::string> found;
  for (const auto& entry : fs::directory_iterator(path)) {
    const auto name = entry.path().filename().string();
    if (name.rfind("libonnxruntime.so", 0) == 0 || (name.rfind("libonnxruntime.", 0) == 0 && entry.path().extension() == ".dylib"))
      found.push_back(entry.path().string());
  }
  std::sort(found.begin(), found.end());
  return found.empty() ? path + "/libonnxruntime.so" : found.front();
}

void* open_library(const std::string& path, std::string& opened) {
  std::vector<std::string> candidates = {"libonnxruntime.so.1", "libonnxruntime.so", "libonnxruntime.dylib"};
  const char* variable = std::getenv("QPERT_ONNXRUNTIME");
  if (!path.empty() || (variable && *variable)) candidates = {library_file(path.empty() ? variable : path)};
  std::string why;
  for (const auto& candidate : candidates) {
    opened = candidate;
    if (void* library = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    if (why.empty()) why = dlerror();
  }
  throw Error("no-onnxruntime", "ONNX Runtime's library cannot be opened (" + why + "); name it with --onnxruntime PATH or in "
                                    "QPERT_ONNXRUNTIME", unavailable);
}

ONNXTensorElementDataType element(Type type) {
  switch (type) {
    case Type::u8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    case Type::i64: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    case Type::f16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case Type::f32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
  }
}

std::string text_of(const std::vector<std::int64_t>& shape) {
  std::string text;
  for (auto length : shape) text += (text.empty() ? "[" : ",") + (length < 0 ? std::string("?") : std::to_string(length));
  return text.empty() ? "[]" : text + "]";
}

// Whether an array may stand where the manifest declares `tensor`.
bool fits(const std::vector<std::int64_t>& shape, const Tensor& tensor) {
  if (shape.size() != tensor.shape.size()) return false;
  for (std::size_t i = 0; i < shape.size(); i++)
    if (tensor.shape[i] >= 0 && shape[i] != tensor.shape[i]) return false;
  return true;
}

void check_input(const Graph& graph, const Tensor& tensor, const Array& array) {
  if (array.type != tensor.type || !fits(array.shape, tensor))
    throw Error("graph-input", "graph " + graph.name + " takes " + tensor.name + " as " + text_of(tensor.shape) + ", got " +
                                   text_of(array.shape) + (array.type == tensor.type ? "" : " of another type"));
  for (std::size_t i = 0; i < tensor.axes.size(); i++) {
    if (tensor.axes[i].empty()) continue;
    const Range& range = graph.ranges.at(tensor.axes[i]);
    const bool is_shared = i == 0 && tensor.shared && array.shape[0] == 1;
    if (!is_shared && (array.shape[i] < range.min || array.shape[i] > range.max))
      throw Error("limit", "graph " + graph.name + ": axis " + tensor.axes[i] + " is " + std::to_string(array.shape[i]) +
                               ", this bundle takes " + std::to_string(range.min) + " to " + std::to_string(range.max));
  }
}

Array copied(const Ort::Value& value, const Graph& graph, const Tensor& tensor) {
  const auto info = value.GetTensorTypeAndShapeInfo();
  if (info.GetElementType() != element(tensor.type) || !fits(info.GetShape(), tensor))
    throw Error("bundle-graph", "graph " + graph.name + " gives " + tensor.name + " as " + text_of(info.GetShape()) +
                                    ", the manifest says " + text_of(tensor.shape) + "; export the bundle again");
  Array array(tensor.type, info.GetShape());
  if (!array.bytes.empty()) std::memcpy(array.bytes.data(), value.GetTensorRawData(), array.bytes.size());
  return array;
}

}  // namespace

Runtime::Runtime(const std::string& path) : state_(std::make_shared<State>()) {
  void* library = open_library(path, state_->library);  // never closed: its threads may outlive us
  auto entry = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
  const OrtApiBase* base = entry ? entry() : nullptr;
  if (!base) throw Error("no-onnxruntime", state_->library + " is not ONNX Runtime's library", unavailable);
  state_->version = base->GetVersionString();
  const auto parts = state_->version.find('.');
  const int minor = parts == std::string::npos ? 0 : std::atoi(state_->version.c_str() + parts + 1);
  const OrtApi* api = minor < ORT_API_VERSION && state_->version.rfind("1.", 0) == 0 ? nullptr : base->GetApi(ORT_API_VERSION);
  if (!api)
    throw Error("onnxruntime-too-old", state_->library + " is ONNX Runtime " + state_->version + "; expected 1." +
                                           std::to_string(ORT_API_VERSION) + " or later", unavailable);
  Ort::InitApi(api);
  state_->environment.emplace(ORT_LOGGING_LEVEL_ERROR, "qpert");
  state_->environment->DisableTelemetryEvents();
}

Runtime::~Runtime() = default;
Runtime::Runtime(Runtime&&) noexcept = default;
const std::string& Runtime::version() const { return state_->version; }
const std::string& Runtime::library() const { return state_->library; }

struct Session::State {
  std::shared_ptr<Runtime::State> runtime;  // outlives the session
  std::optional<Ort::Session> session;
};

Session::Session(const Runtime& runtime, const Manifest& manifest, const Graph& graph, int threads)
    : state_(std::make_unique<State>()), graph_(&graph) {
  const auto path = manifest.path(graph.file);
  state_->runtime = runtime.state_;
  try {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(threads);
    state_->session.emplace(*runtime.state_->environment, path.c_str(), options);
  } catch (const Ort::Exception& error) {
    throw Error("bundle-graph", path.string() + " cannot be opened by ONNX Runtime " + runtime.version() + " (" + error.what() +
                                    "); export the bundle again");
  }
}

Session::~Session() = default;
Session::Session(Session&&) noexcept = default;

Outputs Session::run(const Slots& inputs) const {
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<const char*> input_names, output_names;
  std::vector<Ort::Value> values;
  for (const Tensor& tensor : graph_->inputs) {
    const auto found = inputs.find(tensor.slot);
    if (found == inputs.end()) throw Error("graph-input", "graph " + graph_->name + " needs " + tensor.name);
    const Array& array = *found->second;
    check_input(*graph_, tensor, array);
    input_names.push_back(tensor.name.c_str());
    static std::uint8_t nothing;
    const std::uint8_t* bytes = array.bytes.empty() ? &nothing : array.bytes.data();
    void* data = const_cast<std::uint8_t*>(bytes);  // ONNX Runtime does not write to inputs
    values.push_back(Ort::Value::CreateTensor(memory, data, array.bytes.size(), array.shape.data(), array.shape.size(), element(array.type)));
  }
  for (const Tensor& tensor : graph_->outputs) output_names.push_back(tensor.name.c_str());
  std::vector<Ort::Value> results;
  try {
    results = state_->session->Run(Ort::RunOptions{nullptr}, input_names.data(), values.data(), values.size(), output_names.data(), output_names.size());
  } catch (const Ort::Exception& error) {
    throw Error("bundle-graph", "graph " + graph_->name + " failed (" + error.what() + "); export the bundle again");
  }
  Outputs outputs;
  for (std::size_t i = 0; i < results.size(); i++)
    outputs.emplace(graph_->outputs[i].slot, copied(results[i], *graph_, graph_->outputs[i]));
  return outputs;
}

}  // namespace qpert
