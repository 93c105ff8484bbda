// A picture to pixel_values, natively: the bytes of preprocess.onnx (and of Pillow), without running a graph.
#pragma once

#include "qpert/array.hpp"
#include "qpert/manifest.hpp"
#include "qpert/picture.hpp"

namespace qpert {

// Whether `native_pixels` can stand in for preprocess.onnx. Not for Lanczos, whose sine is not the same everywhere.
bool has_native_pixels(const ImageGeometry& image);

// float32 [1,3,S,S], equal to preprocess.onnx bit for bit. `threads`: how many threads share the rows.
Array native_pixels(const Picture& picture, const ImageGeometry& image, int threads = 1);

// Throws Error for a picture so long that its shorter side at the wanted length makes too many pixels.
void check_elongation(const Picture& picture, const ImageGeometry& image, const std::string& name);

}  // namespace qpert
