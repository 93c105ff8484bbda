// What the library throws on purpose. Codes and exit codes are those of the Python runtime (runtime/errors.py).
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace qpert {

enum Exit { fine = 0, gate_failed = 1, bad_input = 2, unavailable = 3 };

class Error : public std::runtime_error {
 public:
  // `code` names the fault ("box-not-finite") and stays where the message is worded anew.
  Error(std::string code, const std::string& message, Exit exit = bad_input)
      : std::runtime_error(message), code(std::move(code)), exit(exit) {}

  std::string code;
  Exit exit;
};

// A warning: something that was changed or left out on the caller's behalf. Written to stderr.
void warn(const std::string& message);

}  // namespace qpert
