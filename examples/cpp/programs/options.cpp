#include "options.hpp"

#include <charconv>

#include "qpert/error.hpp"

const char* const USAGE =
    "usage: qpert-cpp BUNDLE --text TEXT [--text …] --image FILE [--image …] [--boxes x1,y1,x2,y2 … | --boxes FILE.jsonl]\n"
    "       qpert-cpp BUNDLE --samples\n"
    "\n"
    "Scores every text with every picture (ITC, ITM and their sum), or runs all that was recorded at export.\n"
    "\n"
    "  --text TEXT          a sentence; may be repeated\n"
    "  --image FILE         a JPEG or PNG file; may be repeated\n"
    "  --boxes x1,y1,x2,y2  a box in pixels of the one picture, 0-based, half-open, after EXIF rotation; may be repeated\n"
    "  --boxes FILE.jsonl   boxes of all pictures: lines of {\"image\", \"x1\", \"y1\", \"x2\", \"y2\"}\n"
    "  --samples            run every recorded sample; exit 1 where one is beyond its limit\n"
    "  --pixels graph       make pixels by preprocess.onnx instead of natively (the same bits)\n"
    "  --onnxruntime PATH   ONNX Runtime's library (1.21 or later) or its folder; default: $QPERT_ONNXRUNTIME, the system's\n"
    "  --threads N          threads of one operator; default: as ONNX Runtime chooses\n"
    "  --skip-hashes        do not check the files' SHA-256 (they were checked before)\n"
    "  --json               one JSON document on standard output\n"
    "\n"
    "Exit codes: 0 fine; 1 a sample is beyond its limit; 2 bad input; 3 this machine cannot do it.\n";

namespace {

qpert::Error usage(const std::string& message) { return qpert::Error("usage", message + "; see qpert-cpp --help"); }

int number(const std::string& name, const std::string& text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0 || value > 256)
    throw usage(name + " is '" + text + "', expected a whole number from 0 to 256");
  return value;
}

void check(const Options& options) {
  if (options.bundle.empty()) throw usage("no bundle was named");
  if (options.samples) {
    if (!options.texts.empty() || !options.images.empty() || !options.boxes.empty())
      throw usage("--samples goes without --text, --image and --boxes");
    return;
  }
  if (options.texts.empty() || options.images.empty()) throw usage("expected at least one --text and one --image, or --samples");
}

}  // namespace

Options parse_options(const std::vector<std::string>& arguments) {
  Options options;
  for (std::size_t i = 0; i < arguments.size(); i++) {
    const std::string& name = arguments[i];
    auto value = [&]() -> const std::string& {
      if (i + 1 >= arguments.size()) throw usage(name + " needs a value");
      return arguments[++i];
    };
    if (name == "--text") options.texts.push_back(value());
    else if (name == "--image") options.images.push_back(value());
    else if (name == "--boxes") options.boxes.push_back(value());
    else if (name == "--samples") options.samples = true;
    else if (name == "--json") options.json = true;
    else if (name == "--help" || name == "-h") options.help = true;
    else if (name == "--onnxruntime") options.settings.onnxruntime = value();
    else if (name == "--skip-hashes") options.settings.check_files = false;
    else if (name == "--threads") options.settings.threads = number(name, value());
    else if (name == "--pixels") {
      const std::string& way = value();
      if (way != "graph" && way != "native") throw usage("--pixels is '" + way + "', expected graph or native");
      options.settings.native_pixels = way == "native";
    } else if (name.rfind("--", 0) == 0) throw usage(name + " is not an option");
    else if (options.bundle.empty()) options.bundle = name;
    else throw usage("'" + name + "' is a second bundle; expected one");
  }
  if (!options.help) check(options);
  return options;
}
