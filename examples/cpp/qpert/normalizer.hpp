// The "normalizer" of a tokenizer.json: what is done to a caption before it is split. Source: huggingface/tokenizers.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "qpert/json.hpp"

namespace qpert {

class Normalizer {
 public:
  virtual ~Normalizer() = default;
  virtual std::string operator()(const std::string& text) const = 0;

  // Sequence, Replace (by Oniguruma, which `tokenizers` uses too), Lowercase and BertNormalizer; null gives one that
  // changes nothing. Throws Error for another kind.
  static std::unique_ptr<Normalizer> make(const json& description);
};

// UTF-8 to code points and back. Throws Error for what is no UTF-8.
std::u32string code_points(const std::string& text);
void append_utf8(std::string& text, char32_t character);

// What the tokenizer's splitting needs to know of characters, as Unicode and BERT define it.
bool is_white(char32_t character);
bool is_punctuation(char32_t character);

}  // namespace qpert
