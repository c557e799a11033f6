#include "pinning.hpp"

#include <dlfcn.h>

namespace lmcache {

namespace {

constexpr unsigned kPortable = 1;  // CU_MEMHOSTREGISTER_PORTABLE: for every context of the process

template <class F>
bool find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

Pinned::Pinned(void* base, uint64_t bytes, const std::string& library) : base_(base) {
  void* driver = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (driver == nullptr) {
    why_not_ = "there is no CUDA driver (" + library + ")";
    return;
  }
  int (*current)(void**) = nullptr;
  int (*enlist)(void*, size_t, unsigned) = nullptr;
  int (*delist)(void*) = nullptr;
  if (!find(driver, "cuCtxGetCurrent", current) || !find(driver, "cuMemHostRegister_v2", enlist) ||
      !find(driver, "cuMemHostUnregister", delist)) {
    why_not_ = library + " is no CUDA driver";
    return;
  }
  void* context = nullptr;
  if (current(&context) != 0 || context == nullptr) {
    why_not_ = "this thread has no CUDA context";
    return;
  }
  if (const int code = enlist(base, bytes, kPortable)) {
    why_not_ = "cuMemHostRegister failed with " + std::to_string(code) +
               "; the limit for locked memory (ulimit -l) may be too low";
    return;
  }
  unregister_ = delist;
}

Pinned::~Pinned() {
  if (unregister_ != nullptr) unregister_(base_);
}

}  // namespace lmcache
