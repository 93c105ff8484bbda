// nlohmann-json, whose parser takes long to compile: it is compiled once, in json.cpp.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace qpert {

using nlohmann::json;

json parse_json(const std::string& text);  // throws json::exception

// `indent` as in json::dump. What is no UTF-8 is replaced.
std::string text_of(const json& value, int indent = -1);

}  // namespace qpert
