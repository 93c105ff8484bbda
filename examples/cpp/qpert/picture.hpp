// Photographs from files: upright RGB, 8 bits a channel, the same bytes as Pillow's (runtime/inputs/images.py).
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace qpert {

struct Picture {
  int width = 0, height = 0;
  std::vector<std::uint8_t> rgb;  // row by row, R G B
};

constexpr std::int64_t MOST_PIXELS = 178'956'970;  // Pillow's limit, above which it speaks of a decompression bomb

// A JPEG or PNG file, EXIF orientation applied, colour profiles ignored, alpha dropped. Throws Error for a file that is
// missing, empty, truncated, damaged, too large or of another kind.
Picture read_picture(const std::filesystem::path& path);

// The parts of it.
Picture decode_jpeg(const std::string& bytes, const std::string& name, int& orientation);
Picture decode_png(const std::string& bytes, const std::string& name, int& orientation);
Picture turned(Picture picture, int orientation);  // 1 to 8, as EXIF counts them
void check_size(std::int64_t width, std::int64_t height, const std::string& name);

// EXIF's orientation in a TIFF block (what follows "Exif\0\0"), then in XMP; 1 where neither has one that can be read.
int orientation_of(const std::string& tiff, const std::string& xmp);

}  // namespace qpert
