// How a store says that it cannot do what it was asked. bindings.cpp turns it into Python's
// exception.
#pragma once

#include <stdexcept>
#include <string>

namespace lmcache {

enum class Reason { Io, Full, Corrupt, Busy, Closed };

inline const char* name_of(Reason reason) {
  switch (reason) {
    case Reason::Io:
      return "io";
    case Reason::Full:
      return "full";
    case Reason::Corrupt:
      return "corrupt";
    case Reason::Busy:
      return "busy";
    case Reason::Closed:
      return "closed";
  }
  return "io";
}

class Failure : public std::runtime_error {
 public:
  Failure(Reason reason, const std::string& detail) : std::runtime_error(detail), reason(reason) {}
  const Reason reason;
};

// The volatile half of a store does not hold together; it is made anew from the index.
class ControlDamaged : public Failure {
 public:
  explicit ControlDamaged(const std::string& detail) : Failure(Reason::Corrupt, detail) {}
};

}  // namespace lmcache
