// Pillow's resize of 8-bit pictures in fixed point: columns first, then rows, rounded to 8 bits between the passes.
// Source: Pillow src/libImaging/Resample.c, whose names are kept; runtime/inputs/images.py says why the order matters.
#include "qpert/pixels.hpp"

#include <algorithm>
#include <cmath>
#include <thread>

#include "qpert/error.hpp"

// The inner loops in two versions, of which the processor's is taken when the program starts.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(QPERT_ONE_TARGET)
#define QPERT_FAST __attribute__((target_clones("avx2", "default")))
#else
#define QPERT_FAST
#endif

namespace qpert {
namespace {

constexpr int FRACTION_BITS = 22;  // PRECISION_BITS
constexpr std::int32_t HALF = 1 << (FRACTION_BITS - 1);
constexpr std::int64_t LARGEST_RESIZED = 1 << 26;

// One side: `length` pixels are resized to `resized`, of which `seen` are kept from `offset` on.
struct Side {
  int length, resized, offset, seen;
};

// Output i is the sum of `count[i]` inputs from `first[i]` on, times `weight[i * stride …]`.
struct Weights {
  std::vector<int> first, count;
  std::vector<std::int32_t> weight;
  int stride;
};

double bicubic(double x) {
  constexpr double a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

double bilinear(double x) { return x < 1 ? 1 - x : 0; }

Weights weights_of(const Side& side, const std::string& resample) {
  const bool cubic = resample == "bicubic";
  const double scale = double(side.length) / side.resized, filter_scale = std::max(scale, 1.0);
  const double support = (cubic ? 2.0 : 1.0) * filter_scale, inverse = 1.0 / filter_scale;
  Weights made;
  made.stride = int(std::ceil(support)) * 2 + 1;
  made.weight.assign(std::size_t(side.seen) * made.stride, 0);
  std::vector<double> values(made.stride);
  for (int i = 0; i < side.seen; i++) {
    const double center = (side.offset + i + 0.5) * scale;
    const int first = std::max(int(center - support + 0.5), 0), end = std::min(int(center + support + 0.5), side.length);
    double sum = 0;
    for (int x = first; x < end; x++) {
      const double distance = std::fabs((x - center + 0.5) * inverse);
      values[x - first] = cubic ? bicubic(distance) : bilinear(distance);
      sum += values[x - first];
    }
    for (int x = 0; x < end - first; x++) {
      const double value = values[x] / sum * (1 << FRACTION_BITS);
      made.weight[std::size_t(i) * made.stride + x] = std::int32_t(value < 0 ? value - 0.5 : value + 0.5);
    }
    made.first.push_back(first);
    made.count.push_back(end - first);
  }
  return made;
}

inline std::uint8_t clipped(std::int32_t value) {
  value >>= FRACTION_BITS;
  return std::uint8_t(value < 0 ? 0 : value > 255 ? 255 : value);
}

// One row of RGB pixels to `n` of them.
QPERT_FAST void resize_columns(const std::uint8_t* row, const Weights& w, int n, std::uint8_t* out) {
  for (int x = 0; x < n; x++, out += 3) {
    const std::uint8_t* pixel = row + std::size_t(w.first[x]) * 3;
    const std::int32_t* weight = &w.weight[std::size_t(x) * w.stride];
    std::int32_t r = HALF, g = HALF, b = HALF;
    for (int i = 0, count = w.count[x]; i < count; i++, pixel += 3) {
      r += pixel[0] * weight[i];
      g += pixel[1] * weight[i];
      b += pixel[2] * weight[i];
    }
    out[0] = clipped(r);
    out[1] = clipped(g);
    out[2] = clipped(b);
  }
}

// `count` rows of `n` bytes, `sum` being room for n numbers, to one row of bytes.
QPERT_FAST void resize_rows(const std::uint8_t* rows, const std::int32_t* weight, int count, int n, std::int32_t* sum,
                            std::uint8_t* out) {
  for (int x = 0; x < n; x++) sum[x] = HALF;
  for (int i = 0; i < count; i++, rows += n)
    for (int x = 0; x < n; x++) sum[x] += rows[x] * weight[i];
  for (int x = 0; x < n; x++) out[x] = clipped(sum[x]);
}

// Calls work(begin, end) for parts of 0 … n, each in a thread of its own.
template <class Work>
void in_parts(int n, int threads, const Work& work) {
  threads = std::clamp(threads, 1, std::max(1, n));
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back(work, int(std::int64_t(n) * i / threads), int(std::int64_t(n) * (i + 1) / threads));
  work(0, n / threads);
  for (auto& other : others) other.join();
}

// Width and height of the resized picture, before any crop.
std::pair<std::int64_t, std::int64_t> resized(const Picture& picture, const ImageGeometry& image) {
  if (image.fit == "squash") return {image.size, image.size};
  const std::int64_t side = image.shortest_side, w = picture.width, h = picture.height;
  return w <= h ? std::make_pair(side, side * h / w) : std::make_pair(side * w / h, side);
}

int offset_of(std::int64_t length, const ImageGeometry& image) {
  const std::int64_t rest = length - image.size;
  if (image.rounding == "floor" || rest % 2 == 0) return int(rest / 2);
  return int(rest / 2 % 2 == 0 ? rest / 2 : rest / 2 + 1);  // half to even
}

std::vector<float> normalised_bytes(const ImageGeometry& image) {
  std::vector<float> table(3 * 256);
  for (int channel = 0; channel < 3; channel++)
    for (int byte = 0; byte < 256; byte++)
      table[channel * 256 + byte] = (float(byte) / 255.0f - image.mean[channel]) / image.std[channel];
  return table;
}

}  // namespace

bool has_native_pixels(const ImageGeometry& image) { return image.resample == "bicubic" || image.resample == "bilinear"; }

void check_elongation(const Picture& picture, const ImageGeometry& image, const std::string& name) {
  const auto [width, height] = resized(picture, image);
  if (width * height > LARGEST_RESIZED)
    throw Error("image-elongated", name + " has " + std::to_string(picture.width) + "×" + std::to_string(picture.height) +
                                       " pixels, too long a strip to be resized by its shorter side; cut the picture first");
}

Array native_pixels(const Picture& picture, const ImageGeometry& image, int threads) {
  const auto [width, height] = resized(picture, image);
  const int size = image.size;
  const Weights across = weights_of({picture.width, int(width), offset_of(width, image), size}, image.resample);
  const Weights down = weights_of({picture.height, int(height), offset_of(height, image), size}, image.resample);
  const int top = down.first.front(), bottom = down.first.back() + down.count.back(), row = size * 3;
  std::vector<std::uint8_t> narrow(std::size_t(bottom - top) * row);  // the rows that the second pass reads
  in_parts(bottom - top, threads, [&](int begin, int end) {
    for (int y = begin; y < end; y++)
      resize_columns(&picture.rgb[std::size_t(top + y) * picture.width * 3], across, size, &narrow[std::size_t(y) * row]);
  });
  const std::vector<float> table = normalised_bytes(image);
  Array pixels(Type::f32, {1, 3, size, size});
  float* values = pixels.data<float>();
  in_parts(size, threads, [&](int begin, int end) {
    std::vector<std::int32_t> sum(row);
    std::vector<std::uint8_t> line(row);
    for (int y = begin; y < end; y++) {
      resize_rows(&narrow[std::size_t(down.first[y] - top) * row], &down.weight[std::size_t(y) * down.stride], down.count[y],
                  row, sum.data(), line.data());
      for (int channel = 0; channel < 3; channel++)
        for (int x = 0; x < size; x++)
          values[(std::size_t(channel) * size + y) * size + x] = table[channel * 256 + line[x * 3 + channel]];
    }
  });
  return pixels;
}

}  // namespace qpert
