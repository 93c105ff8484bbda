#include "qpert/json.hpp"

namespace qpert {

json parse_json(const std::string& text) { return json::parse(text); }

std::string text_of(const json& value, int indent) {
  return value.dump(indent, ' ', false, json::error_handler_t::replace);
}

}  // namespace qpert
