// Captions to token ids: the bundle's tokenizer.json, which cleans, cuts and frames them itself. BERT's WordPiece, which
// BLIP-2 uses; the tokenizers of CLIP (byte-level BPE) and SigLIP (Unigram) are refused.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "qpert/array.hpp"
#include "qpert/manifest.hpp"
#include "qpert/normalizer.hpp"

namespace qpert {

struct Tokens {
  Array input_ids, attention_mask;  // int64 [T,L], padded to the longest or to the full length
  std::size_t truncated = 0, empty = 0;  // texts that were cut, and texts without any word
};

class Tokenizer {
 public:
  // Throws Error for a file that is missing, is no tokenizer.json, or is of a kind that is not read here.
  static Tokenizer open(const Manifest& manifest);

  // The ids of one text, special tokens included. Throws Error for a blank text and for what is no UTF-8.
  std::vector<std::int64_t> encode(const std::string& text, bool* truncated = nullptr) const;
  Tokens encode(const std::vector<std::string>& texts) const;

 private:
  void word(const std::u32string& word, std::vector<std::int64_t>& ids) const;

  TokenizerSpec spec_;
  std::shared_ptr<const Normalizer> normalizer_;
  std::unordered_map<std::string, std::int64_t> vocabulary_;
  std::int64_t unknown_ = 0;
  std::size_t longest_word_ = 100;
  std::string continuation_;
  std::vector<std::int64_t> before_, after_;  // the frame
};

}  // namespace qpert
