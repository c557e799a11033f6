// A CUDA driver without a GPU, for tests of what is asked of one: libcuda.so.1 with the functions
// that kernels/cuda/driver.py calls. Work is queued, and done when the test says so, as a GPU does
// it late; what a call would refuse on a GPU (no context, unknown memory, a batch on the legacy
// stream) is refused. A launch is handed to the test, which emulates it.
//
// Addresses of "device" memory are ordinary ones that the test has registered as such.
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <string>
#include <vector>

namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidImage = 200, kInvalidContext = 201,
              kNotFound = 500;
constexpr size_t kParamBytes = 200;

struct Area {
  uint64_t size;
  int type;  // CU_MEMORYTYPE_HOST is 1, CU_MEMORYTYPE_DEVICE 2
};

using OnLaunch = void (*)(const char* kernel, const uint8_t* params, unsigned blocks,
                          unsigned threads);

std::map<uint64_t, Area> areas;
std::deque<std::function<void()>> queue;
std::vector<std::string> calls;
std::string image;
std::deque<std::string> functions;
OnLaunch on_launch = nullptr;
int depth = 0;  // of the context's stack
int version = 13000;
int reads_any = 0;  // memory of the host, pinned or not

const Area* area_of(uint64_t address) {
  auto after = areas.upper_bound(address);
  if (after == areas.begin()) return nullptr;
  --after;
  return address < after->first + after->second.size ? &after->second : nullptr;
}

bool known(uint64_t address, uint64_t size) {
  return size == 0 || (area_of(address) && area_of(address) == area_of(address + size - 1));
}

int enqueue_copy(uint64_t dst, uint64_t src, size_t size) {
  if (depth == 0) return kInvalidContext;
  if (!known(dst, size) || !known(src, size)) return kInvalidValue;
  queue.push_back(
      [=] { std::memcpy(reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), size); });
  return kSuccess;
}

}  // namespace

extern "C" {

// For the test.
void fake_register(uint64_t address, uint64_t size, int type) { areas[address] = {size, type}; }
void fake_on_launch(OnLaunch callback) { on_launch = callback; }
void fake_set_version(int wanted) { version = wanted; }
void fake_set_reads_any(int wanted) { reads_any = wanted; }
int fake_depth() { return depth; }
void fake_run() {
  for (; !queue.empty(); queue.pop_front()) queue.front()();
}
int fake_calls(const char* name) {
  int count = 0;
  for (const auto& call : calls) count += call == name;
  return count;
}

// For the driver's user.
int cuInit(unsigned) { return kSuccess; }
int cuDriverGetVersion(int* value) { return *value = version, kSuccess; }
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? kSuccess : 101;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  const std::map<int, int> known{{75, 9}, {76, 0}, {16, 132}, {88, reads_any}};
  *value = known.contains(attribute) ? known.at(attribute) : 0;
  return kSuccess;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &areas;
  return kSuccess;
}
int cuDevicePrimaryCtxRelease_v2(int) { return calls.push_back("release"), kSuccess; }
int cuDevicePrimaryCtxRelease(int device) { return cuDevicePrimaryCtxRelease_v2(device); }
int cuCtxPushCurrent_v2(void* context) {
  if (context != &areas) return kInvalidContext;
  ++depth;
  return kSuccess;
}
int cuCtxPushCurrent(void* context) { return cuCtxPushCurrent_v2(context); }
int cuCtxPopCurrent_v2(void** context) {
  *context = &areas;
  return depth-- > 0 ? kSuccess : kInvalidContext;
}
int cuCtxPopCurrent(void** context) { return cuCtxPopCurrent_v2(context); }
int cuGetErrorString(int error, const char** text) {
  *text = error == kInvalidImage ? "device kernel image is invalid" : "refused by the fake";
  return kSuccess;
}
int cuModuleLoadData(void** module, const void* data) {
  if (depth == 0) return kInvalidContext;
  if (std::memcmp(data, "\177ELF", 4) != 0) return kInvalidImage;
  uint64_t section_headers;
  uint16_t each, count;
  const auto* bytes = static_cast<const char*>(data);
  std::memcpy(&section_headers, bytes + 0x28, 8);
  std::memcpy(&each, bytes + 0x3A, 2);
  std::memcpy(&count, bytes + 0x3C, 2);
  uint64_t end = section_headers + uint64_t{each} * count;
  image.assign(bytes, end);
  *module = &image;
  return kSuccess;
}
int cuModuleUnload(void*) {
  if (depth == 0) return kInvalidContext;
  calls.push_back("unload");
  return kSuccess;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (module != &image || image.find(std::string(".text.") + name) == std::string::npos)
    return kNotFound;
  *function = &functions.emplace_back(name);
  return kSuccess;
}
int cuLaunchKernel(void* function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned,
                   unsigned, unsigned, void*, void** params, void**) {
  if (depth == 0) return kInvalidContext;
  calls.push_back("launch");
  const std::string kernel = *static_cast<std::string*>(function);
  const auto* first = static_cast<const uint8_t*>(params[0]);
  const std::vector<uint8_t> copied(first, first + kParamBytes);
  queue.push_back([=] { on_launch(kernel.c_str(), copied.data(), blocks, threads); });
  return kSuccess;
}
int cuMemcpyAsync(uint64_t dst, uint64_t src, size_t size, void*) {
  calls.push_back("copy");
  return enqueue_copy(dst, src, size);
}
int cuMemcpyBatchAsync_v2(uint64_t* dst, uint64_t* src, size_t* sizes, size_t count, void*,
                          size_t* first, size_t attributes, void* stream) {
  calls.push_back("batch");
  if (attributes != 1 || first[0] != 0 || reinterpret_cast<uintptr_t>(stream) < 3)
    return kInvalidValue;
  for (size_t i = 0; i < count; ++i)
    if (const int failed = enqueue_copy(dst[i], src[i], sizes[i])) return failed;
  return kSuccess;
}
int cuMemcpyBatchAsync(uint64_t* dst, uint64_t* src, size_t* sizes, size_t count, void* how,
                       size_t* first, size_t attributes, void* stream) {
  return cuMemcpyBatchAsync_v2(dst, src, sizes, count, how, first, attributes, stream);
}
int cuPointerGetAttribute(void* value, int attribute, uint64_t address) {
  if (depth == 0) return kInvalidContext;
  calls.push_back("pointer");
  const auto after = areas.upper_bound(address);
  const Area* area = area_of(address);
  if (area == nullptr) return kInvalidValue;
  const std::map<int, uint64_t> wide{{3, address}, {11, std::prev(after)->first}, {12, area->size}};
  if (attribute == 2)
    *static_cast<unsigned*>(value) = static_cast<unsigned>(area->type);
  else if (wide.contains(attribute))
    *static_cast<uint64_t*>(value) = wide.at(attribute);
  else
    return kInvalidValue;
  return kSuccess;
}

int cuGetProcAddress_v2(const char* name, void** found, int, uint64_t, int* status) {
  Dl_info self;
  dladdr(reinterpret_cast<void*>(&cuInit), &self);
  *found = dlsym(dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD), name);
  if (status != nullptr) *status = *found ? 0 : 1;
  return *found ? kSuccess : kNotFound;
}
int cuGetProcAddress(const char* name, void** found, int cuda, uint64_t flags) {
  return cuGetProcAddress_v2(name, found, cuda, flags, nullptr);
}
}
