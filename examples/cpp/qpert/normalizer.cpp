#include "qpert/normalizer.hpp"

#include <oniguruma.h>
#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>

#include "qpert/error.hpp"

namespace qpert {
namespace {

using Character = char32_t;

utf8proc_category_t category(Character c) { return utf8proc_category(utf8proc_int32_t(c)); }

// Lower case letter by letter, as Rust's char::to_lowercase: İ alone becomes two characters.
void append_lower(std::u32string& out, Character c) {
  if (c == 0x130)
    out += U"i\u0307";
  else
    out += Character(utf8proc_tolower(utf8proc_int32_t(c)));
}

std::u32string lower(const std::u32string& text) {
  std::u32string out;
  for (Character c : text) append_lower(out, c);
  return out;
}

std::string utf8(const std::u32string& text) {
  std::string out;
  for (Character c : text) append_utf8(out, c);
  return out;
}

bool is_chinese(Character c) {
  constexpr Character RANGES[][2] = {{0x4E00, 0x9FFF},   {0x3400, 0x4DBF},   {0x20000, 0x2A6DF}, {0x2A700, 0x2B73F},
                                     {0x2B740, 0x2B81F}, {0x2B920, 0x2CEAF}, {0xF900, 0xFAFF},   {0x2F800, 0x2FA1F}};
  return std::any_of(std::begin(RANGES), std::end(RANGES), [c](auto& range) { return range[0] <= c && c <= range[1]; });
}

// Cc, Cf, Co and Cs. Code points that are not assigned stay.
bool is_control(Character c) {
  if (c == '\t' || c == '\n' || c == '\r') return false;
  auto kind = category(c);
  return kind == UTF8PROC_CATEGORY_CC || kind == UTF8PROC_CATEGORY_CF || kind == UTF8PROC_CATEGORY_CO ||
         kind == UTF8PROC_CATEGORY_CS;
}

class Sequence : public Normalizer {
 public:
  explicit Sequence(const json& steps) {
    for (const json& step : steps) steps_.push_back(make(step));
  }
  std::string operator()(const std::string& text) const override {
    std::string result = text;
    for (const auto& step : steps_) result = (*step)(result);
    return result;
  }

 private:
  std::vector<std::unique_ptr<Normalizer>> steps_;
};

class Lowercase : public Normalizer {
 public:
  std::string operator()(const std::string& text) const override { return utf8(lower(code_points(text))); }
};

class Replace : public Normalizer {
 public:
  explicit Replace(const json& description) : content_(description.at("content").get<std::string>()) {
    const json& pattern = description.at("pattern");
    const bool literal = pattern.contains("String");
    const std::string source = pattern.at(literal ? "String" : "Regex").get<std::string>();
    static std::once_flag once;
    std::call_once(once, [] {
      OnigEncoding utf8[] = {ONIG_ENCODING_UTF8};
      onig_initialize(utf8, 1);
    });
    const auto* begin = reinterpret_cast<const OnigUChar*>(source.data());
    OnigErrorInfo info;
    regex_t* made = nullptr;
    const int status = onig_new(&made, begin, begin + source.size(), ONIG_OPTION_NONE, ONIG_ENCODING_UTF8,
                                literal ? ONIG_SYNTAX_ASIS : ONIG_SYNTAX_ONIGURUMA, &info);
    if (status != ONIG_NORMAL) {
      OnigUChar message[ONIG_MAX_ERROR_MESSAGE_LEN];
      onig_error_code_to_str(message, status, &info);
      throw Error("tokenizer-regex", "tokenizer.json has a pattern that Oniguruma " + std::string(onig_version()) +
                                         " does not take (" + reinterpret_cast<char*>(message) + "): " + source.substr(0, 80));
    }
    regex_.reset(made);
  }

  std::string operator()(const std::string& text) const override {
    const auto* begin = reinterpret_cast<const OnigUChar*>(text.data());
    const auto* end = begin + text.size();
    std::unique_ptr<OnigRegion, FreeRegion> region(onig_region_new());
    std::string out;
    std::size_t copied = 0;
    for (const OnigUChar* from = begin; from < end;) {
      const int found = onig_search(regex_.get(), begin, end, from, end, region.get(), ONIG_OPTION_NONE);
      if (found == ONIG_MISMATCH) break;
      if (found < 0) throw Error("tokenizer-regex", "a pattern of tokenizer.json failed on a text (it is too long or too odd)");
      const std::size_t first = region->beg[0], last = region->end[0];
      out.append(text, copied, first - copied);
      out += content_;
      copied = last;
      from = begin + last;
      if (first == last) from += from < end ? ONIGENC_MBC_ENC_LEN(ONIG_ENCODING_UTF8, from) : 1;
    }
    return out.append(text, copied, std::string::npos);
  }

 private:
  struct FreeRegex {
    void operator()(regex_t* regex) const { onig_free(regex); }
  };
  struct FreeRegion {
    void operator()(OnigRegion* region) const { onig_region_free(region, 1); }
  };
  std::string content_;
  std::unique_ptr<regex_t, FreeRegex> regex_;
};

class Bert : public Normalizer {
 public:
  explicit Bert(const json& description)
      : clean_(description.at("clean_text").get<bool>()),
        chinese_(description.at("handle_chinese_chars").get<bool>()),
        lowercase_(description.at("lowercase").get<bool>()) {
    const json& accents = description.at("strip_accents");
    strip_ = accents.is_null() ? lowercase_ : accents.get<bool>();
  }

  std::string operator()(const std::string& text) const override {
    std::u32string characters;
    for (Character c : code_points(text)) {
      if (clean_ && (c == 0 || c == 0xFFFD || is_control(c))) continue;  // controls first: U+0085 is one, and white, too
      if (clean_ && is_white(c)) c = ' ';
      if (chinese_ && is_chinese(c))
        characters.append({U' ', c, U' '});
      else
        characters += c;
    }
    if (strip_) characters = without_accents(characters);
    return utf8(lowercase_ ? lower(characters) : characters);
  }

 private:
  static std::u32string without_accents(const std::u32string& text) {
    const std::string bytes = utf8(text);
    utf8proc_uint8_t* decomposed = nullptr;
    const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE);
    const auto length = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(bytes.data()),
                                     utf8proc_ssize_t(bytes.size()), &decomposed, options);
    std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(decomposed, std::free);
    if (length < 0) throw Error("text-surrogates", std::string("a text cannot be decomposed: ") + utf8proc_errmsg(length));
    std::u32string out;
    for (Character c : code_points(std::string(reinterpret_cast<char*>(decomposed), std::size_t(length))))
      if (category(c) != UTF8PROC_CATEGORY_MN) out += c;
    return out;
  }

  bool clean_, chinese_, strip_ = false, lowercase_;
};

}  // namespace

std::unique_ptr<Normalizer> Normalizer::make(const json& description) {
  if (description.is_null()) return std::make_unique<Sequence>(json::array());
  const std::string kind = description.at("type").get<std::string>();
  if (kind == "Sequence") return std::make_unique<Sequence>(description.at("normalizers"));
  if (kind == "Replace") return std::make_unique<Replace>(description);
  if (kind == "Lowercase") return std::make_unique<Lowercase>();
  if (kind == "BertNormalizer") return std::make_unique<Bert>(description);
  throw Error("tokenizer-kind", "tokenizer.json has a normalizer of type " + kind +
                                    "; this program knows Sequence, Replace, Lowercase and BertNormalizer");
}

std::u32string code_points(const std::string& text) {
  std::u32string out;
  const auto* place = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  for (auto left = utf8proc_ssize_t(text.size()); left > 0;) {
    utf8proc_int32_t character;
    const auto length = utf8proc_iterate(place, left, &character);
    if (length < 1) throw Error("text-surrogates", "a text is not valid UTF-8; expected text in UTF-8");
    out += Character(character);
    place += length;
    left -= length;
  }
  return out;
}

void append_utf8(std::string& text, Character character) {
  utf8proc_uint8_t bytes[4];
  const auto length = utf8proc_encode_char(utf8proc_int32_t(character), bytes);
  text.append(reinterpret_cast<char*>(bytes), std::size_t(length));
}

bool is_white(Character c) {
  return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool is_punctuation(Character c) {
  if ((c >= 33 && c <= 47) || (c >= 58 && c <= 64) || (c >= 91 && c <= 96) || (c >= 123 && c <= 126)) return true;
  auto kind = category(c);
  return kind >= UTF8PROC_CATEGORY_PC && kind <= UTF8PROC_CATEGORY_PO;
}

}  // namespace qpert
