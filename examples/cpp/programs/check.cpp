// What tests and benchmarks need of the library, many inputs in one process:
//
//   qpert-cpp-check tokenize BUNDLE FILE          FILE: a JSON array of texts → their ids; null where a text is refused
//   qpert-cpp-check decode FILE OUT               a picture → OUT as raw RGB; prints width and height
//   qpert-cpp-check pixels BUNDLE OUT [--library L] WIDTHxHEIGHT RAW …
//                                                 raw RGB pictures → pixel_values, native then graph, one after the other
//   qpert-cpp-check abuse LIBRARY FILE            FILE: lines "kind path"; prints "ok" or the code of the error for each
//   qpert-cpp-check time BUNDLE LIBRARY REPEATS THREADS PICTURE TEXT   medians in milliseconds, as JSON
#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <functional>
#include <iostream>

#include "qpert/boxes.hpp"
#include "qpert/error.hpp"
#include "qpert/json.hpp"
#include "qpert/picture.hpp"
#include "qpert/pixels.hpp"
#include "qpert/retriever.hpp"
#include "qpert/samples.hpp"

namespace {

using namespace qpert;
using Arguments = std::vector<std::string>;

void write(const std::string& path, const void* data, std::size_t length, bool append = false) {
  std::ofstream file(path, append ? std::ios::binary | std::ios::app : std::ios::binary);
  file.write(static_cast<const char*>(data), std::streamsize(length));
}

int tokenize(const Arguments& arguments) {
  const Tokenizer tokenizer = Tokenizer::open(Manifest::read(arguments.at(0)));
  json results = json::array();
  for (const json& text : parse_json(read_file(arguments.at(1), "texts", "a JSON array of texts"))) {
    try {
      results.push_back(tokenizer.encode(text.get<std::string>()));
    } catch (const Error&) {
      results.push_back(nullptr);
    }
  }
  std::cout << text_of(results) << "\n";
  return fine;
}

int decode(const Arguments& arguments) {
  const Picture picture = read_picture(arguments.at(0));
  write(arguments.at(1), picture.rgb.data(), picture.rgb.size());
  std::cout << picture.width << " " << picture.height << "\n";
  return fine;
}

int pixels(const Arguments& arguments) {
  const Manifest manifest = Manifest::read(arguments.at(0));
  const std::string out = arguments.at(1);
  const Session graph(Runtime(arguments.at(2)), manifest, manifest.graph("preprocess"));
  write(out, nullptr, 0);
  for (std::size_t i = 3; i + 1 < arguments.size(); i += 2) {
    const auto cross = arguments[i].find('x');
    Picture picture{std::stoi(arguments[i].substr(0, cross)), std::stoi(arguments[i].substr(cross + 1)), {}};
    const std::string bytes = read_file(arguments[i + 1], "image-missing", "raw pixels");
    picture.rgb.assign(bytes.begin(), bytes.end());
    Array image(Type::u8, {picture.height, picture.width, 3});
    image.bytes = picture.rgb;
    const Array native = native_pixels(picture, manifest.image, 1 + int(i) % 3);  // any number of threads
    const Array made = graph.run({{"image", &image}}).at("pixels");
    write(out, native.bytes.data(), native.bytes.size(), true);
    write(out, made.bytes.data(), made.bytes.size(), true);
  }
  return fine;
}

void abuse_one(const std::string& kind, const std::string& path, const std::string& library) {
  if (kind == "picture") {
    const Picture picture = read_picture(path);
    ImageGeometry image;
    image.size = 32;
    image.std = {1, 1, 1};
    image.resample = "bicubic";
    image.fit = "squash";
    native_pixels(picture, image);
  } else if (kind == "boxes") {
    for (const auto& [name, boxes] : read_box_file(path)) clipped(boxes, 640, 480);
  } else if (kind == "bundle") {
    Manifest::read(path).check_files();
    Tokenizer::open(Manifest::read(path)).encode("A red box, [CLS] on a TABLE!");
    Samples::read(Manifest::read(path));
  } else if (kind == "samples") {
    Settings settings;
    settings.onnxruntime = library;
    Retriever retriever(path, settings);
    for (const Gate& gate : verify_samples(retriever))
      if (!gate.passes()) throw Error("gate", gate.name);
  } else {
    throw Error("usage", "unknown kind " + kind);
  }
}

int abuse(const Arguments& arguments) {
  std::ifstream list(arguments.at(1));
  for (std::string kind, path; list >> kind && std::getline(list >> std::ws, path);) {
    std::string result = "ok";
    try {
      abuse_one(kind, path, arguments.at(0));
    } catch (const Error& error) {
      result = error.code;
    } catch (const std::bad_alloc&) {
      result = "no-memory";
    } catch (const std::exception& error) {
      result = std::string("exception ") + error.what();
    }
    std::cout << result << std::endl;
  }
  return fine;
}

// The median of `repeats` runs in milliseconds, after one that is not counted.
double median_ms(int repeats, const std::function<void()>& work) {
  std::vector<double> times;
  for (int i = 0; i <= repeats; i++) {
    const auto start = std::chrono::steady_clock::now();
    work();
    if (i) times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

int time_all(const Arguments& arguments) {
  Settings settings;
  settings.onnxruntime = arguments.at(1);
  settings.threads = std::stoi(arguments.at(3));
  Retriever retriever(arguments.at(0), settings);
  const int repeats = std::stoi(arguments.at(2));
  const std::string file = arguments.at(4);
  const std::vector<std::string> texts = {arguments.at(5)};
  const Picture picture = read_picture(file);
  const std::vector<Box> boxes = {{0.1 * picture.width, 0.1 * picture.height, 0.4 * picture.width, 0.5 * picture.height},
                                  {0.5 * picture.width, 0.5 * picture.height, 0.9 * picture.width, 0.9 * picture.height}};
  Array image(Type::u8, {picture.height, picture.width, 3});
  image.bytes = picture.rgb;
  const ImageFeatures features = retriever.encode_image(picture, boxes);
  json results;
  auto add = [&](const char* name, const std::function<void()>& work) { results[name] = median_ms(repeats, work); };
  add("decode", [&] { read_picture(file); });
  add("pixels_native", [&] { native_pixels(picture, retriever.manifest().image, 1); });
  add("pixels_native_2_threads", [&] { native_pixels(picture, retriever.manifest().image, 2); });
  add("pixels_graph", [&] { retriever.session("preprocess").run({{"image", &image}}); });
  add("encode_image", [&] { retriever.encode_image(picture); });
  add("encode_image_2_boxes", [&] { retriever.encode_image(picture, boxes); });
  add("encode_text", [&] { retriever.encode_texts(texts); });
  if (retriever.reranks()) add("itm", [&] { retriever.itm(features, texts); });
  add("tokenize", [&] { retriever.tokenizer().encode(texts); });
  std::cout << text_of(results) << "\n";
  return fine;
}

}  // namespace

int main(int count, char** values) {
  const Arguments arguments(values + std::min(count, 2), values + count);
  const std::string command = count > 1 ? values[1] : "";
  try {
    if (command == "tokenize") return tokenize(arguments);
    if (command == "decode") return decode(arguments);
    if (command == "pixels") return pixels(arguments);
    if (command == "abuse") return abuse(arguments);
    if (command == "time") return time_all(arguments);
    std::cerr << "expected tokenize, decode, pixels, abuse or time\n";
    return bad_input;
  } catch (const Error& error) {
    std::cerr << "error: " << error.what() << "\n";
    return error.exit;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return bad_input;
  }
}
