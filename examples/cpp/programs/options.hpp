// The command line of qpert-cpp.
#pragma once

#include <string>
#include <vector>

#include "qpert/retriever.hpp"

struct Options {
  std::string bundle;
  std::vector<std::string> texts, images, boxes;  // boxes: x1,y1,x2,y2, or one JSONL file
  bool samples = false, json = false, help = false;
  qpert::Settings settings;
};

extern const char* const USAGE;

// Throws qpert::Error for what is no command line of it.
Options parse_options(const std::vector<std::string>& arguments);
