#include "qpert/boxes.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <sstream>

#include "qpert/error.hpp"
#include "qpert/json.hpp"
#include "qpert/manifest.hpp"

namespace qpert {
namespace {


constexpr double EDGE_TOLERANCE = 1.0;  // pixels: a detector's rounding, not a box of another picture

std::string shown(const NamedBox& named) {
  char text[200];
  std::snprintf(text, sizeof text, " (%.10g, %.10g, %.10g, %.10g)", named.box[0], named.box[1], named.box[2], named.box[3]);
  return named.source + text;
}

std::string file_name(const std::string& name) {
  auto slash = name.find_last_of("/\\");
  return slash == std::string::npos ? name : name.substr(slash + 1);
}

void check(const NamedBox& named) {
  const auto& [x1, y1, x2, y2] = named.box;
  if (!std::isfinite(x1 + y1 + x2 + y2) || !std::isfinite(x1) || !std::isfinite(y1) || !std::isfinite(x2) || !std::isfinite(y2))
    throw Error("box-not-finite", shown(named) + " is not finite; expected four numbers x1, y1, x2, y2");
  if (x1 > x2 || y1 > y2)
    throw Error("box-inverted", shown(named) + " is inverted; expected x1 < x2 and y1 < y2 (corners, not width and height)");
  if (x1 == x2 || y1 == y2)
    throw Error("box-empty", shown(named) + " is empty; expected x1 < x2 and y1 < y2 (x2 and y2 are exclusive)");
}

double coordinate(const json& row, const char* key, const std::string& source) {
  const auto value = row.find(key);
  if (value == row.end()) throw Error("box-column-missing", source + " has no " + key + "; expected image, x1, y1, x2, y2");
  if (!value->is_number()) throw Error("box-number", source + ": " + key + " is " + text_of(*value).substr(0, 60) + ", no number");
  return value->get<double>();
}

}  // namespace

NamedBox parse_box(const std::string& text) {
  NamedBox named{{}, "--boxes"};
  const char* place = text.c_str();
  for (int i = 0; i < 4; i++) {
    char* end = nullptr;
    named.box[i] = std::strtod(place, &end);
    if (end == place || *end != (i < 3 ? ',' : '\0'))
      throw Error("box-number", "--boxes " + text.substr(0, 100) + " is no box; expected x1,y1,x2,y2 or the name of a .jsonl file");
    place = end + 1;
  }
  check(named);
  return named;
}

std::map<std::string, std::vector<NamedBox>> read_box_file(const std::filesystem::path& path) {
  std::istringstream lines(read_file(path, "box-file-missing", "a JSONL file of boxes"));
  std::map<std::string, std::vector<NamedBox>> found;
  std::string line;
  for (int number = 1; std::getline(lines, line); number++) {
    if (number == 1 && line.compare(0, 3, "\xEF\xBB\xBF") == 0) line.erase(0, 3);
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const std::string source = path.string() + ":" + std::to_string(number) + ": box";
    json row;
    try {
      row = parse_json(line);
    } catch (const json::exception& error) {
      if (line.find("NaN") != std::string::npos || line.find("Infinity") != std::string::npos)
        throw Error("box-not-finite", source + " is not finite; expected four numbers x1, y1, x2, y2");
      throw Error("box-file-json", source + " is not JSON: " + error.what());
    }
    if (!row.is_object()) throw Error("box-file-entry", source + " is no JSON object");
    const auto image = row.find("image");
    if (image == row.end() || !image->is_string()) throw Error("box-column-missing", source + " names no image");
    NamedBox named{{}, source};
    const char* keys[] = {"x1", "y1", "x2", "y2"};
    for (int i = 0; i < 4; i++) named.box[i] = coordinate(row, keys[i], source);
    check(named);
    found[image->get<std::string>()].push_back(named);
  }
  return found;
}

std::vector<NamedBox> boxes_of(const std::map<std::string, std::vector<NamedBox>>& file, const std::string& image) {
  if (auto same = file.find(image); same != file.end()) return same->second;
  std::vector<std::string> names;
  for (const auto& [name, boxes] : file)
    if (file_name(name) == file_name(image)) names.push_back(name);
  if (names.size() > 1)
    throw Error("box-image-name", image + " could be '" + names[0] + "' or '" + names[1] + "' of the box file; give its full name");
  return names.empty() ? std::vector<NamedBox>{} : file.at(names[0]);
}

std::vector<Box> clipped(const std::vector<NamedBox>& boxes, int width, int height) {
  const std::string image = "the image of " + std::to_string(width) + "×" + std::to_string(height) + " pixels";
  std::vector<Box> kept;
  for (const NamedBox& named : boxes) {
    check(named);
    const auto& [x1, y1, x2, y2] = named.box;
    const double gap = std::max({-x2, -y2, x1 - width, y1 - height});
    if (gap >= EDGE_TOLERANCE)
      throw Error("box-outside", shown(named) + " lies outside " + image + "; are these pixels of this image, as it is after "
                                     "EXIF orientation?");
    if (gap >= 0) {
      warn(shown(named) + " lay just outside " + image + ": left out");
      continue;
    }
    const Box inside = {std::max(x1, 0.0), std::max(y1, 0.0), std::min(x2, double(width)), std::min(y2, double(height))};
    if (inside != named.box) warn(shown(named) + " reached out of " + image + ": clipped to it");
    kept.push_back(inside);
  }
  return kept;
}

}  // namespace qpert
