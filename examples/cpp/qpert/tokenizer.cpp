#include "qpert/tokenizer.hpp"

#include <algorithm>

#include "qpert/error.hpp"
#include "qpert/json.hpp"

namespace qpert {
namespace {


Error unusable(const std::string& why) {
  return Error("tokenizer-unreadable", "tokenizer.json cannot be used (" + why + "); export the bundle again");
}

// The kinds that are read, and one clear sentence for those that are not.
void check_kind(const json& document, const TokenizerSpec& spec) {
  const std::string model = document.at("model").at("type").get<std::string>();
  if (spec.kind != "wordpiece" || model != "WordPiece")
    throw Error("tokenizer-kind", "this bundle's tokenizer is " + spec.kind + " (" + model + "); this program reads BERT's "
                                      "WordPiece, as BLIP-2 uses it: encode texts in Python, or with a tokenizer library");
  const json& splitting = document.at("pre_tokenizer");
  if (splitting.is_null() || splitting.at("type") != "BertPreTokenizer")
    throw Error("tokenizer-kind", "tokenizer.json does not split texts as BERT does; this program knows BertPreTokenizer");
  const json& normalizer = document.at("normalizer");
  if (spec.clean == "lavis" && (normalizer.is_null() || normalizer.at("type") != "Sequence" || !document.at("added_tokens").empty()))
    throw Error("tokenizer-cleaning", "tokenizer.json does not clean captions itself, as those of newer exports do; export "
                                      "the bundle again");
  if (!document.at("added_tokens").empty())
    throw Error("tokenizer-kind", "tokenizer.json has added tokens, which this program does not know");
}

// Python's str.strip() would leave nothing.
bool is_blank(const std::string& text) {
  const auto characters = code_points(text);
  return std::all_of(characters.begin(), characters.end(), [](char32_t c) { return is_white(c) || (c >= 0x1C && c <= 0x1F); });
}

// The ids before and after the text in a TemplateProcessing; none where there is no post-processor.
void read_frame(const json& processor, std::vector<std::int64_t>& before, std::vector<std::int64_t>& after) {
  if (processor.is_null()) return;
  if (processor.at("type") != "TemplateProcessing") throw unusable("its post-processor is no TemplateProcessing");
  auto* ids = &before;
  for (const json& piece : processor.at("single")) {
    if (piece.contains("Sequence")) {
      ids = &after;
      continue;
    }
    const std::string name = piece.at("SpecialToken").at("id").get<std::string>();
    for (const json& id : processor.at("special_tokens").at(name).at("ids")) ids->push_back(id.get<std::int64_t>());
  }
}

}  // namespace

Tokenizer Tokenizer::open(const Manifest& manifest) {
  Tokenizer made;
  made.spec_ = manifest.tokenizer;
  const auto text = read_file(manifest.path(manifest.tokenizer.file), "tokenizer-unreadable", "a tokenizer.json");
  try {
    const json document = parse_json(text);
    check_kind(document, made.spec_);
    made.normalizer_ = Normalizer::make(document.at("normalizer"));
    const json& model = document.at("model");
    for (const auto& [token, id] : model.at("vocab").items()) {
      const auto number = id.get<std::int64_t>();
      if (!id.is_number_integer() || number < 0 || number >= made.spec_.vocab_size)
        throw Error("tokenizer-vocabulary", "tokenizer.json has the id " + text_of(id) + "; expected ids below " +
                                                std::to_string(made.spec_.vocab_size) + ", the rows of the word embeddings");
      made.vocabulary_[token] = number;
    }
    const auto unknown = made.vocabulary_.find(model.at("unk_token").get<std::string>());
    if (unknown == made.vocabulary_.end()) throw unusable("its vocabulary lacks the unknown token");
    made.unknown_ = unknown->second;
    made.longest_word_ = model.at("max_input_chars_per_word").get<std::uint16_t>();
    made.continuation_ = model.at("continuing_subword_prefix").get<std::string>();
    read_frame(document.at("post_processor"), made.before_, made.after_);
  } catch (const json::exception& error) {
    throw unusable(error.what());
  }
  for (auto id : made.before_)
    if (id < 0 || id >= made.spec_.vocab_size) throw unusable("its frame has the id " + std::to_string(id));
  for (auto id : made.after_)
    if (id < 0 || id >= made.spec_.vocab_size) throw unusable("its frame has the id " + std::to_string(id));
  if (std::int64_t(made.before_.size() + made.after_.size()) >= made.spec_.max_length)
    throw Error("tokenizer-max-length", "max_length leaves no room for a token of the text; export the bundle again");
  return made;
}

std::vector<std::int64_t> Tokenizer::encode(const std::string& text, bool* truncated) const {
  if (is_blank(text)) throw Error("text-blank", "a text is blank; expected at least one word");
  std::vector<std::int64_t> ids;
  std::u32string current;
  auto flush = [&] {
    if (!current.empty()) word(current, ids);
    current.clear();
  };
  for (char32_t c : code_points((*normalizer_)(text))) {
    if (is_white(c)) {
      flush();
    } else if (is_punctuation(c)) {
      flush();
      word(std::u32string(1, c), ids);
    } else {
      current += c;
    }
  }
  flush();
  const std::size_t room = std::size_t(spec_.max_length) - before_.size() - after_.size();
  if (truncated) *truncated = ids.size() > room;
  if (ids.size() > room) ids.resize(room);
  ids.insert(ids.begin(), before_.begin(), before_.end());
  ids.insert(ids.end(), after_.begin(), after_.end());
  return ids;
}

// The longest piece of the vocabulary first, again and again; a word that cannot be covered is unknown as a whole.
void Tokenizer::word(const std::u32string& word, std::vector<std::int64_t>& ids) const {
  if (word.size() > longest_word_) {
    ids.push_back(unknown_);
    return;
  }
  std::string bytes;
  std::vector<std::size_t> ends;  // where each character ends in `bytes`
  for (char32_t c : word) {
    append_utf8(bytes, c);
    ends.push_back(bytes.size());
  }
  std::vector<std::int64_t> pieces;
  for (std::size_t first = 0, start = 0; first < word.size();) {
    std::size_t last = word.size();
    for (; last > first; last--) {
      const auto found = vocabulary_.find((first ? continuation_ : "") + bytes.substr(start, ends[last - 1] - start));
      if (found == vocabulary_.end()) continue;
      pieces.push_back(found->second);
      break;
    }
    if (last == first) {
      ids.push_back(unknown_);
      return;
    }
    first = last;
    start = ends[last - 1];
  }
  ids.insert(ids.end(), pieces.begin(), pieces.end());
}

Tokens Tokenizer::encode(const std::vector<std::string>& texts) const {
  Tokens made;
  std::vector<std::vector<std::int64_t>> rows;
  std::size_t length = 0;
  for (const auto& text : texts) {
    bool truncated = false;
    rows.push_back(encode(text, &truncated));
    made.truncated += truncated;
    made.empty += rows.back().size() == before_.size() + after_.size();
    length = std::max(length, rows.back().size());
  }
  if (spec_.pad == "max_length") length = std::size_t(spec_.max_length);
  const std::vector<std::int64_t> shape = {std::int64_t(rows.size()), std::int64_t(length)};
  made.input_ids = made.attention_mask = Array(Type::i64, shape);
  for (std::size_t row = 0; row < rows.size(); row++) {
    auto *ids = made.input_ids.data<std::int64_t>() + row * length, *mask = made.attention_mask.data<std::int64_t>() + row * length;
    std::fill(ids, ids + length, spec_.pad_id);
    const std::size_t place = spec_.pad_side == "right" ? 0 : length - rows[row].size();
    std::copy(rows[row].begin(), rows[row].end(), ids + place);
    std::fill(mask + place, mask + place + rows[row].size(), 1);
  }
  return made;
}

}  // namespace qpert
