#include <png.h>

#include <algorithm>
#include <csetjmp>
#include <cstring>
#include <memory>

#include "qpert/error.hpp"
#include "qpert/picture.hpp"

namespace qpert {
namespace {

// What libpng reads from, and where it leaves. Jumps leave only steps that own nothing.
struct Decoder {
  png_structp png = nullptr;
  png_infop info = nullptr;
  const std::string& bytes;
  std::size_t place = 0;
  std::string message = "its data cannot be read";
  std::vector<std::uint8_t> pixels;  // as libpng gives them: 1 or 3 channels of 8 bits, or 1 of 16
  std::vector<png_bytep> rows;
  bool wide = false, grey = false;
  std::jmp_buf jump;

  explicit Decoder(const std::string& bytes) : bytes(bytes) {}
  ~Decoder() { png_destroy_read_struct(&png, &info, nullptr); }

  static void read(png_structp png, png_bytep target, png_size_t length) {
    auto* self = static_cast<Decoder*>(png_get_io_ptr(png));
    if (length > self->bytes.size() - self->place) png_error(png, "the data ends before the picture does");
    std::memcpy(target, self->bytes.data() + self->place, length);
    self->place += length;
  }
  [[noreturn]] static void failed(png_structp png, png_const_charp message) {
    auto* self = static_cast<Decoder*>(png_get_error_ptr(png));
    self->message = message;
    std::longjmp(self->jump, 1);
  }
  static void ignored(png_structp, png_const_charp) {}

  bool header() {
    if (setjmp(jump)) return false;
    png = png_create_read_struct(PNG_LIBPNG_VER_STRING, this, failed, ignored);
    info = png ? png_create_info_struct(png) : nullptr;
    if (!info) return false;
    png_set_read_fn(png, this, read);
    png_read_info(png, info);
    return true;
  }

  bool start() {
    if (setjmp(jump)) return false;
    const auto colour = png_get_color_type(png, info);
    grey = !(colour & PNG_COLOR_MASK_COLOR);
    wide = colour == PNG_COLOR_TYPE_GRAY && png_get_bit_depth(png, info) == 16;  // Pillow's mode I;16
    if (colour == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(png);
    if (grey && png_get_bit_depth(png, info) < 8) png_set_expand_gray_1_2_4_to_8(png);
    if (!wide) png_set_strip_16(png);
    png_set_strip_alpha(png);
    png_set_interlace_handling(png);
    png_read_update_info(png, info);
    return true;
  }

  bool read_rows() {
    if (setjmp(jump)) return false;
    png_read_image(png, rows.data());
    return true;
  }

  // What stands behind the pixels may say how they are to be turned. Where it is cut off, the picture is whole, and
  // Pillow takes it, too.
  void read_end() {
    if (setjmp(jump)) return;
    png_read_end(png, info);
  }

  std::string exif() const {
    png_bytep data = nullptr;
    png_uint_32 length = 0;
    if (!png_get_eXIf_1(png, info, &length, &data)) return {};
    return std::string(reinterpret_cast<const char*>(data), length);
  }
  std::string xmp() const {
    png_textp texts = nullptr;
    int count = png_get_text(png, info, &texts, nullptr);
    for (int i = 0; i < count; i++)
      if (std::strcmp(texts[i].key, "XML:com.adobe.xmp") == 0 && texts[i].text) return texts[i].text;
    return {};
  }
};

// 16-bit grey: values up to 255 as they are, as Pillow reads them; else all of them scaled to 8 bits.
std::vector<std::uint8_t> narrowed(const std::vector<std::uint8_t>& wide) {
  std::vector<std::uint32_t> values(wide.size() / 2);
  for (std::size_t i = 0; i < values.size(); i++) values[i] = wide[2 * i] << 8 | wide[2 * i + 1];
  const bool small = values.empty() || *std::max_element(values.begin(), values.end()) <= 255;
  std::vector<std::uint8_t> narrow(values.size());
  for (std::size_t i = 0; i < values.size(); i++)
    narrow[i] = static_cast<std::uint8_t>(small ? values[i] : (values[i] * 255 + 32767) / 65535);
  return narrow;
}

}  // namespace

Picture decode_png(const std::string& bytes, const std::string& name, int& orientation) {
  auto decoder = std::make_unique<Decoder>(bytes);
  auto fail = [&] {
    throw Error("image-broken", name + " is broken or truncated: " + decoder->message + ". Replace the file or leave it out.");
  };
  if (!decoder->header()) fail();
  const auto width = png_get_image_width(decoder->png, decoder->info);
  const auto height = png_get_image_height(decoder->png, decoder->info);
  check_size(width, height, name);
  if (!decoder->start()) fail();
  const std::size_t row = png_get_rowbytes(decoder->png, decoder->info);
  decoder->pixels.resize(row * height);
  for (std::size_t y = 0; y < height; y++) decoder->rows.push_back(&decoder->pixels[y * row]);
  if (!decoder->read_rows()) fail();
  decoder->read_end();
  orientation = orientation_of(decoder->exif(), decoder->xmp());
  Picture picture{static_cast<int>(width), static_cast<int>(height), std::move(decoder->pixels)};
  if (decoder->wide) picture.rgb = narrowed(picture.rgb);
  if (decoder->grey) {
    std::vector<std::uint8_t> rgb;
    rgb.reserve(picture.rgb.size() * 3);
    for (auto level : picture.rgb) rgb.insert(rgb.end(), 3, level);
    picture.rgb = std::move(rgb);
  }
  return picture;
}

}  // namespace qpert
