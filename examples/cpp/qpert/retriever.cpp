#include "qpert/retriever.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "qpert/error.hpp"
#include "qpert/pixels.hpp"

namespace qpert {
namespace {

// Rows begin … end of an array, as a copy.
Array rows(const Array& array, std::size_t begin, std::size_t end) {
  auto shape = array.shape;
  shape[0] = std::int64_t(end - begin);
  Array part(array.type, shape);
  const std::size_t row = array.row_bytes();
  std::copy(array.bytes.begin() + begin * row, array.bytes.begin() + end * row, part.bytes.begin());
  return part;
}

// The one row of an array, `count` times.
Array repeated(const Array& array, std::size_t count) {
  auto shape = array.shape;
  shape[0] = std::int64_t(count);
  Array made(array.type, shape);
  for (std::size_t i = 0; i < count; i++) std::copy(array.bytes.begin(), array.bytes.end(), made.bytes.begin() + i * array.bytes.size());
  return made;
}

void append(Array& array, const Array& more) {
  if (array.shape.empty()) {
    array = more;
    return;
  }
  array.shape[0] += more.shape[0];
  array.bytes.insert(array.bytes.end(), more.bytes.begin(), more.bytes.end());
}

}  // namespace

Retriever::Retriever(const std::filesystem::path& bundle, const Settings& settings)
    : manifest_(std::make_unique<Manifest>(Manifest::read(bundle))), settings_(settings) {
  if (settings.check_files) manifest_->check_files();
  tokenizer_ = Tokenizer::open(*manifest_);
  runtime_ = std::make_unique<Runtime>(settings.onnxruntime);
}

const Session& Retriever::session(const std::string& role) {
  auto found = sessions_.find(role);
  if (found == sessions_.end())
    found = sessions_.emplace(role, Session(*runtime_, *manifest_, manifest_->graph(role), settings_.threads)).first;
  return found->second;
}

Array Retriever::pixels(const Picture& picture, const std::string& name) {
  check_elongation(picture, manifest_->image, name);
  if (settings_.native_pixels && has_native_pixels(manifest_->image))
    return native_pixels(picture, manifest_->image, std::max(1, settings_.threads));
  Array image(Type::u8, {picture.height, picture.width, 3});
  std::copy(picture.rgb.begin(), picture.rgb.end(), image.bytes.begin());
  return session("preprocess").run({{"image", &image}}).at("pixels");
}

ImageFeatures Retriever::encode_image(const Picture& picture, const std::vector<Box>& boxes, const std::string& name) {
  const Graph& head = manifest_->graph("query_head");
  if (!boxes.empty() && !head.takes("object_masks"))
    throw Error("bundle-without-boxes", "this bundle (" + manifest_->family + ") takes no boxes; leave them out");
  if (!boxes.empty() && std::int64_t(boxes.size()) > head.most("O"))
    throw Error("boxes-limit", name + " has " + std::to_string(boxes.size()) + " boxes, this bundle takes up to " +
                                   std::to_string(head.most("O")) + "; keep the best ones");
  ImageFeatures features;
  const Array pixel_values = pixels(picture, name);
  features.image_tokens = session("image_tower").run({{"pixels", &pixel_values}}).at("image_tokens");
  Slots slots = {{"image_tokens", &features.image_tokens}};
  if (!head.takes("object_masks")) {
    features.vectors = session("query_head").run(slots).at("image_vectors");
    return features;
  }
  Array corners(Type::f32, {1, std::int64_t(boxes.size()), 4}), size(Type::f32, {1, 2});
  for (std::size_t i = 0; i < boxes.size(); i++)
    for (int k = 0; k < 4; k++) corners.data<float>()[4 * i + k] = float(boxes[i][k]);
  size.data<float>()[0] = float(picture.width);
  size.data<float>()[1] = float(picture.height);
  Outputs made = session("boxes").run({{"boxes", &corners}, {"image_size", &size}});
  Array &masks = made.at("object_masks"), &weights = made.at("box_weights");
  if (manifest_->perturbation.stages == "none") std::fill(weights.bytes.begin(), weights.bytes.end(), 0);
  if (manifest_->perturbation.splits_boxes() && !boxes.empty()) {
    features.vectors = encode_sets(features.image_tokens, masks, weights);
    return features;
  }
  slots["object_masks"] = &masks;
  slots["box_weights"] = &weights;
  features.vectors = session("query_head").run(slots).at("image_vectors");
  if (const Graph* scorer = manifest_->find("pair_scorer"); scorer && scorer->takes("object_masks")) {
    features.masks = std::move(masks);
    features.weights = std::move(weights);
  }
  return features;
}

// A query set for each box: the head sees the picture once a set, with that set's box alone. With `keep_stock` the first
// set is stock, with one box of weight 0.
Array Retriever::encode_sets(const Array& image_tokens, const Array& masks, const Array& weights) {
  const Session& head = session("query_head");
  const std::size_t stock = manifest_->perturbation.keep_stock ? 1 : 0, boxes = std::size_t(masks.shape[1]);
  Array set_masks(Type::f32, {std::int64_t(stock + boxes), 1, masks.shape[2]}), set_weights(Type::f32, {std::int64_t(stock + boxes), 1});
  std::copy(masks.bytes.begin(), masks.bytes.end(), set_masks.bytes.begin() + stock * set_masks.row_bytes());
  std::copy(weights.bytes.begin(), weights.bytes.end(), set_weights.bytes.begin() + stock * set_weights.row_bytes());
  const auto most = std::size_t(head.graph().most("B"));
  const bool shared = head.graph().input("image_tokens").shared;
  Array vectors;
  for (std::size_t begin = 0; begin < stock + boxes; begin += most) {
    const std::size_t end = std::min(stock + boxes, begin + most);
    const Array tokens = shared ? image_tokens : repeated(image_tokens, end - begin);
    const Array some_masks = rows(set_masks, begin, end), some_weights = rows(set_weights, begin, end);
    append(vectors, head.run({{"image_tokens", &tokens}, {"object_masks", &some_masks}, {"box_weights", &some_weights}}).at("image_vectors"));
  }
  return vectors;
}

Array Retriever::encode_texts(const std::vector<std::string>& texts) {
  if (texts.empty()) throw Error("no-texts", "got no texts to encode, expected at least one");
  const Session& tower = session("text_tower");
  const auto most = std::size_t(tower.graph().most("T"));
  Array vectors;
  for (std::size_t begin = 0; begin < texts.size(); begin += most) {
    const std::vector<std::string> some(texts.begin() + begin, texts.begin() + std::min(texts.size(), begin + most));
    const Tokens tokens = tokenizer_.encode(some);
    if (tokens.truncated && !warned_) {
      warned_ = true;
      warn(std::to_string(tokens.truncated) + " of " + std::to_string(some.size()) + " texts are longer than the limit of " +
           std::to_string(manifest_->tokenizer.max_length) + " tokens and were truncated");
    }
    if (tokens.empty) warn(std::to_string(tokens.empty) + " texts hold no word, and are encoded as the empty text");
    append(vectors, tower.run({{"token_ids", &tokens.input_ids}, {"token_mask", &tokens.attention_mask}}).at("text_vectors"));
  }
  return vectors;
}

std::vector<double> Retriever::itc(const ImageFeatures& image, const Array& texts) const {
  const std::size_t width = std::size_t(texts.shape.at(1)), queries = image.vectors.count() / std::max<std::size_t>(1, width);
  if (image.vectors.type != Type::f32 || texts.type != Type::f32 || image.vectors.shape.back() != texts.shape[1])
    throw Error("score-shapes", "the vectors of images and texts do not go together; export the bundle again");
  std::vector<double> scores(std::size_t(texts.shape[0]), -std::numeric_limits<double>::infinity());
  for (std::size_t text = 0; text < scores.size(); text++)
    for (std::size_t query = 0; query < queries; query++) {
      const float *a = image.vectors.data<float>() + query * width, *b = texts.data<float>() + text * width;
      double product = 0;
      for (std::size_t i = 0; i < width; i++) product += double(a[i]) * b[i];
      scores[text] = std::max(scores[text], product);
    }
  return scores;
}

std::vector<double> Retriever::itm(const ImageFeatures& image, const std::vector<std::string>& texts) {
  const Session& scorer = session("pair_scorer");
  const auto most = std::size_t(scorer.graph().most("T"));
  std::vector<double> scores;
  for (std::size_t begin = 0; begin < texts.size(); begin += most) {
    Tokens tokens = tokenizer_.encode(std::vector<std::string>(texts.begin() + begin, texts.begin() + std::min(texts.size(), begin + most)));
    for (Array* array : {&tokens.input_ids, &tokens.attention_mask}) array->shape.insert(array->shape.begin(), 1);  // [1,T,L]
    Slots slots = {{"image_tokens", &image.image_tokens}, {"token_ids", &tokens.input_ids}, {"token_mask", &tokens.attention_mask}};
    if (image.masks) slots["object_masks"] = &*image.masks;
    if (image.weights) slots["box_weights"] = &*image.weights;
    const auto some = as_doubles(scorer.run(slots).at("pair_scores"));
    scores.insert(scores.end(), some.begin(), some.end());
  }
  return scores;
}

}  // namespace qpert
