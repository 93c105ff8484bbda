// qpert-cpp: scores of sentences with photographs, by a bundle that `qpert export` made. No Python is involved.
#include <cstdio>
#include <iostream>
#include <new>

#include "options.hpp"
#include "qpert/boxes.hpp"
#include "qpert/error.hpp"
#include "qpert/json.hpp"
#include "qpert/picture.hpp"
#include "qpert/retriever.hpp"
#include "qpert/samples.hpp"

namespace {

using namespace qpert;

std::vector<std::vector<Box>> boxes_for(const Options& options, const std::vector<Picture>& pictures) {
  std::vector<std::vector<Box>> found(pictures.size());
  if (options.boxes.empty()) return found;
  const std::string& first = options.boxes.front();
  if (first.size() > 6 && first.compare(first.size() - 6, 6, ".jsonl") == 0) {
    if (options.boxes.size() > 1) throw Error("usage", "--boxes names a file and something else; expected one file, or boxes");
    const auto file = read_box_file(first);
    for (std::size_t i = 0; i < pictures.size(); i++)
      found[i] = clipped(boxes_of(file, options.images[i]), pictures[i].width, pictures[i].height);
    return found;
  }
  if (pictures.size() > 1) throw Error("usage", "boxes on the command line are of one picture, got several; use a .jsonl file");
  std::vector<NamedBox> boxes;
  for (const auto& text : options.boxes) boxes.push_back(parse_box(text));
  found[0] = clipped(boxes, pictures[0].width, pictures[0].height);
  return found;
}

json score(const Options& options) {
  Retriever retriever(options.bundle, options.settings);
  std::vector<Picture> pictures;
  for (const auto& image : options.images) pictures.push_back(read_picture(image));
  const auto boxes = boxes_for(options, pictures);
  const Array texts = retriever.encode_texts(options.texts);
  json results = json::array();
  for (std::size_t i = 0; i < pictures.size(); i++) {
    const ImageFeatures features = retriever.encode_image(pictures[i], boxes[i], options.images[i]);
    const auto itc = retriever.itc(features, texts);
    const auto itm = retriever.reranks() ? retriever.itm(features, options.texts) : std::vector<double>();
    json scores = json::array();
    for (std::size_t text = 0; text < itc.size(); text++) {
      json one = {{"text", options.texts[text]}, {"itc", itc[text]}, {"itm", nullptr}, {"score", itc[text]}};
      if (retriever.reranks()) {
        one["itm"] = itm[text];
        one["score"] = itm[text] + itc[text];
      }
      scores.push_back(one);
    }
    results.push_back({{"image", options.images[i]},
                       {"size", {pictures[i].width, pictures[i].height}},
                       {"boxes", boxes[i].size()},
                       {"scores", scores}});
  }
  return {{"onnxruntime", retriever.runtime().version()}, {"images", results}};
}

void print_scores(const json& results) {
  for (const auto& image : results["images"]) {
    std::printf("%s (%d×%d, %d boxes)\n", image["image"].get<std::string>().c_str(), image["size"][0].get<int>(),
                image["size"][1].get<int>(), image["boxes"].get<int>());
    for (const auto& one : image["scores"]) {
      std::printf("  itc %8.5f  ", one["itc"].get<double>());
      if (!one["itm"].is_null()) std::printf("itm %9.5f  ", one["itm"].get<double>());
      std::printf("score %9.5f  %s\n", one["score"].get<double>(), one["text"].get<std::string>().c_str());
    }
  }
}

json verify(const Options& options, bool& passes) {
  Retriever retriever(options.bundle, options.settings);
  json gates = json::array();
  passes = true;
  for (const Gate& gate : verify_samples(retriever)) {
    gates.push_back({{"name", gate.name}, {"value", gate.value}, {"limit", gate.limit}, {"pass", gate.passes()}});
    passes = passes && gate.passes();
  }
  return {{"verdict", passes ? "pass" : "fail"}, {"onnxruntime", retriever.runtime().version()}, {"gates", gates}};
}

void print_gates(const json& results) {
  for (const auto& gate : results["gates"]) {
    const double value = gate["value"].is_null() ? -1 : gate["value"].get<double>();  // JSON has no NaN
    std::printf("%-4s %9.2e  limit %7.1e  %s\n", gate["pass"].get<bool>() ? "ok" : "FAIL", value, gate["limit"].get<double>(),
                gate["name"].get<std::string>().c_str());
  }
  std::printf("%s (ONNX Runtime %s)\n", results["verdict"].get<std::string>().c_str(), results["onnxruntime"].get<std::string>().c_str());
}

int run(const Options& options) {
  if (options.help) {
    std::cout << USAGE;
    return fine;
  }
  bool passes = true;
  const json results = options.samples ? verify(options, passes) : score(options);
  if (options.json)
    std::cout << text_of(results, 2) << "\n";
  else if (options.samples)
    print_gates(results);
  else
    print_scores(results);
  std::fflush(stdout);
  if (!std::cout.flush() || std::ferror(stdout)) throw Error("stdout", "the results cannot be written to standard output", unavailable);
  return passes ? fine : gate_failed;
}

}  // namespace

int main(int count, char** values) {
  try {
    return run(parse_options({values + 1, values + count}));
  } catch (const Error& error) {
    std::cerr << "error: " << error.what() << "\n";
    return error.exit;
  } catch (const std::bad_alloc&) {
    std::cerr << "error: there is not enough memory; end other programs\n";
    return unavailable;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return bad_input;
  }
}
