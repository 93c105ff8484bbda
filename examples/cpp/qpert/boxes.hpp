// Object boxes: pixels of the upright picture, 0-based, half-open. The rules are those of runtime/inputs/boxes.py.
#pragma once

#include <array>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace qpert {

using Box = std::array<double, 4>;  // x1, y1, x2, y2

struct NamedBox {
  Box box;
  std::string source;  // where it was read, for messages
};

// "x1,y1,x2,y2". Throws Error for anything else.
NamedBox parse_box(const std::string& text);

// The boxes of a JSONL file by image name: an object a line with image, x1, y1, x2, y2.
std::map<std::string, std::vector<NamedBox>> read_box_file(const std::filesystem::path& path);

// Those of one image: of its name as given, else of its file name where that means one image of the file.
std::vector<NamedBox> boxes_of(const std::map<std::string, std::vector<NamedBox>>& file, const std::string& image);

// Checked, and clipped to a picture of that size with a warning. Throws Error for NaN, an inverted or empty box, and one
// that misses the picture by a pixel or more; one that misses it by less is left out with a warning.
std::vector<Box> clipped(const std::vector<NamedBox>& boxes, int width, int height);

}  // namespace qpert
