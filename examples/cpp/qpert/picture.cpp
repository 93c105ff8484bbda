#include "qpert/picture.hpp"

#include <cstdio>  // before jpeglib.h, which needs it

#include <jpeglib.h>

#include <csetjmp>
#include <cstring>
#include <memory>

#include "qpert/error.hpp"
#include "qpert/manifest.hpp"

namespace qpert {
namespace {

const std::string EXIF("Exif\0\0", 6), XMP("http://ns.adobe.com/xap/1.0/\0", 29);

Error broken(const std::string& name, const std::string& why) {
  return Error("image-broken", name + " is broken or truncated: " + why + ". Replace the file or leave it out.");
}

// Whole numbers of a TIFF block, of either byte order; reading past its end gives `fine` = false.
class Tiff {
 public:
  explicit Tiff(const std::string& bytes) : bytes_(bytes), big_(bytes.compare(0, 2, "MM") == 0) {}
  bool fine = true;

  std::uint32_t number(std::size_t place, int length) {
    if (place > bytes_.size() || bytes_.size() - place < static_cast<std::size_t>(length)) return fine = false, 0;
    std::uint32_t value = 0;
    for (int i = 0; i < length; i++) {
      auto byte = static_cast<std::uint8_t>(bytes_[place + (big_ ? i : length - 1 - i)]);
      value = value << 8 | byte;
    }
    return value;
  }

 private:
  const std::string& bytes_;
  bool big_;
};

// The tag in the first directory; 0 where it is not there, -1 where it is there and says nothing.
int orientation_in_tiff(const std::string& bytes) {
  if (bytes.compare(0, 2, "II") != 0 && bytes.compare(0, 2, "MM") != 0) return 0;
  Tiff tiff(bytes);
  std::size_t place = tiff.number(4, 4);
  int entries = static_cast<int>(tiff.number(place, 2));
  for (place += 2; tiff.fine && entries > 0; entries--, place += 12) {
    if (tiff.number(place, 2) != 0x0112) continue;
    std::uint32_t kind = tiff.number(place + 2, 2), count = tiff.number(place + 4, 4);
    bool is_short = kind == 3 || kind == 8, is_long = kind == 4 || kind == 9;
    if (count != 1 || !(is_short || is_long)) return -1;
    std::uint32_t value = tiff.number(place + 8, is_short ? 2 : 4);
    return tiff.fine && value >= 1 && value <= 8 ? static_cast<int>(value) : -1;
  }
  return 0;
}

// As Pillow searches: tiff:Orientation="6" or <tiff:Orientation>6.
int orientation_in_xmp(const std::string& xmp) {
  for (const char* form : {"tiff:Orientation=\"", "tiff:Orientation>"}) {
    auto place = xmp.find(form);
    if (place == std::string::npos) continue;
    char digit = place + std::strlen(form) < xmp.size() ? xmp[place + std::strlen(form)] : '0';
    return digit >= '1' && digit <= '8' ? digit - '0' : 1;
  }
  return 1;
}

// libjpeg's errors, as a jump: an exception must not pass through C code.
struct Errors {
  jpeg_error_mgr manager;
  std::jmp_buf jump;
  char message[JMSG_LENGTH_MAX];
};

[[noreturn]] void leave(j_common_ptr info) {
  auto* errors = reinterpret_cast<Errors*>(info->err);
  info->err->format_message(info, errors->message);
  std::longjmp(errors->jump, 1);
}

// The data has ended and the picture has not. (libjpeg's own reader would invent an end and give grey rows.)
boolean end_of_data(j_decompress_ptr info) {
  auto* errors = reinterpret_cast<Errors*>(info->err);
  std::strcpy(errors->message, "the data ends before the picture does");
  std::longjmp(errors->jump, 1);
}

void skip(j_decompress_ptr info, long count) {
  if (count <= 0) return;
  if (static_cast<std::size_t>(count) > info->src->bytes_in_buffer) end_of_data(info);
  info->src->next_input_byte += count;
  info->src->bytes_in_buffer -= static_cast<std::size_t>(count);
}

void nothing(j_decompress_ptr) {}
void quiet(j_common_ptr, int) {}  // Pillow takes warnings for nothing, too

// Adobe's inverted CMYK to RGB, as Pillow converts it.
void cmyk_to_rgb(const std::uint8_t* cmyk, std::uint8_t* rgb, int pixels) {
  for (int x = 0; x < pixels; x++, cmyk += 4, rgb += 3)
    for (int channel = 0; channel < 3; channel++) {
      int product = (255 - cmyk[channel]) * cmyk[3] + 128;
      int value = cmyk[3] - (((product >> 8) + product) >> 8);
      rgb[channel] = static_cast<std::uint8_t>(value < 0 ? 0 : value);
    }
}

struct Decoder {
  jpeg_decompress_struct info{};
  Errors errors{};
  jpeg_source_mgr source{};
  std::string exif, xmp;
  Picture picture;
  std::vector<std::uint8_t> row;

  ~Decoder() { jpeg_destroy_decompress(&info); }

  // The steps that may jump: they own nothing that a jump would leak.
  bool header(const std::string& bytes) {
    info.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = leave;
    errors.manager.emit_message = quiet;
    if (setjmp(errors.jump)) return false;
    jpeg_create_decompress(&info);
    source.next_input_byte = reinterpret_cast<const JOCTET*>(bytes.data());
    source.bytes_in_buffer = bytes.size();
    source.init_source = nothing;
    source.fill_input_buffer = end_of_data;
    source.skip_input_data = skip;
    source.resync_to_restart = jpeg_resync_to_restart;
    source.term_source = nothing;
    info.src = &source;
    jpeg_save_markers(&info, JPEG_APP0 + 1, 0xFFFF);
    return jpeg_read_header(&info, TRUE) == JPEG_HEADER_OK;
  }

  bool start() {
    if (setjmp(errors.jump)) return false;
    info.out_color_space = info.num_components == 4 ? JCS_CMYK : JCS_RGB;
    return jpeg_start_decompress(&info);
  }

  bool rows() {
    if (setjmp(errors.jump)) return false;
    while (info.output_scanline < info.output_height) {
      std::uint8_t* target = &picture.rgb[std::size_t{3} * info.output_width * info.output_scanline];
      std::uint8_t* line = info.out_color_space == JCS_CMYK ? row.data() : target;
      jpeg_read_scanlines(&info, &line, 1);
      if (line != target) cmyk_to_rgb(line, target, static_cast<int>(info.output_width));
    }
    return jpeg_finish_decompress(&info);
  }

  void read_markers() {
    for (auto* marker = info.marker_list; marker; marker = marker->next) {
      std::string data(reinterpret_cast<const char*>(marker->data), marker->data_length);
      if (data.compare(0, EXIF.size(), EXIF) == 0) exif += data.substr(EXIF.size());
      if (data.compare(0, XMP.size(), XMP) == 0) xmp = data.substr(XMP.size());
    }
  }
};

}  // namespace

int orientation_of(const std::string& tiff, const std::string& xmp) {
  int found = orientation_in_tiff(tiff);
  return found == 0 ? orientation_in_xmp(xmp) : found < 0 ? 1 : found;
}

void check_size(std::int64_t width, std::int64_t height, const std::string& name) {
  if (width < 1 || height < 1) throw Error("image-empty", name + " has zero size");
  if (width * height > MOST_PIXELS)
    throw Error("image-too-large", name + " has " + std::to_string(width) + "×" + std::to_string(height) +
                                       " pixels; expected at most " + std::to_string(MOST_PIXELS) + ". Downsize it first.");
}

Picture decode_jpeg(const std::string& bytes, const std::string& name, int& orientation) {
  auto decoder = std::make_unique<Decoder>();
  if (!decoder->header(bytes)) throw broken(name, decoder->errors.message);
  auto& info = decoder->info;
  check_size(info.image_width, info.image_height, name);
  if (info.num_components != 1 && info.num_components != 3 && info.num_components != 4)
    throw broken(name, std::to_string(info.num_components) + " channels");
  decoder->read_markers();
  decoder->picture.width = static_cast<int>(info.image_width);
  decoder->picture.height = static_cast<int>(info.image_height);
  decoder->picture.rgb.resize(std::size_t{3} * info.image_width * info.image_height);
  decoder->row.resize(std::size_t{4} * info.image_width);
  if (!decoder->start() || !decoder->rows()) throw broken(name, decoder->errors.message);
  orientation = orientation_of(decoder->exif, decoder->xmp);
  return std::move(decoder->picture);
}

Picture turned(Picture picture, int orientation) {
  if (orientation < 2 || orientation > 8) return picture;
  const int w = picture.width, h = picture.height;
  const bool quarter = orientation >= 5;
  Picture made{quarter ? h : w, quarter ? w : h, std::vector<std::uint8_t>(picture.rgb.size())};
  const bool from_right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool from_bottom = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  for (int y = 0; y < made.height; y++)
    for (int x = 0; x < made.width; x++) {
      int column = quarter ? y : x, row = quarter ? x : y;
      if (from_right) column = w - 1 - column;
      if (from_bottom) row = h - 1 - row;
      const std::uint8_t* from = &picture.rgb[(std::size_t(row) * w + column) * 3];
      std::copy(from, from + 3, &made.rgb[(std::size_t(y) * made.width + x) * 3]);
    }
  return made;
}

Picture read_picture(const std::filesystem::path& path) {
  const std::string name = path.string(), bytes = read_file(path, "image-missing", "a JPEG or PNG file");
  if (bytes.empty()) throw Error("image-empty", name + " is an empty file; expected an image");
  int orientation = 1;
  Picture picture;
  if (bytes.compare(0, 3, "\xff\xd8\xff") == 0)
    picture = decode_jpeg(bytes, name, orientation);
  else if (bytes.compare(0, 8, "\x89PNG\r\n\x1a\n") == 0)
    picture = decode_png(bytes, name, orientation);
  else
    throw Error("image-format", name + " is neither JPEG nor PNG, which this program reads; convert it first");
  return turned(std::move(picture), orientation);
}

}  // namespace qpert
