// One CUDA device without a driver: enough for the autograd engine to walk a graph of fake tensors.
//
// Each table entry below answers for the device while `install` is in force; `restore` puts back what was there.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <sys/mman.h>
#include <unistd.h>

#include <utility>

namespace {

using namespace c10;

// The guard that fake tensors install by themselves has device index -1, which the engine uses to index a vector.
struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  const Device device{DeviceType::CUDA, 0};
  const Stream stream{Stream::DEFAULT, device};
  Device exchangeDevice(Device) const override { return device; }
  Device getDevice() const override { return device; }
  Stream getStream(Device) const noexcept override { return stream; }
  Stream getNewStream(Device, int) const override { return stream; }
  Stream exchangeStream(Stream) const noexcept override { return stream; }
};

bool is_built(const void*) { return true; }
bool has_primary_context(const void*, DeviceIndex) { return false; }

// The hooks cannot be registered twice, so two entries of their virtual table change.
template <class Method>
void** entry_of(Method method) {
  static_assert(sizeof(method) == 2 * sizeof(size_t), "the Itanium C++ ABI");
  auto offset = reinterpret_cast<const size_t&>(method) & ~size_t{1};
  auto table = *reinterpret_cast<char* const*>(&at::detail::getCUDAHooks());
  return reinterpret_cast<void**>(table + offset);
}

void* exchange(void** entry, void* value) {
  auto size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  auto page = reinterpret_cast<void*>(reinterpret_cast<size_t>(entry) & ~(size - 1));
  TORCH_CHECK(!mprotect(page, size, PROT_READ | PROT_WRITE), "the table of the CUDA hooks is read-only");
  return std::exchange(*entry, value);
}

void** built() { return entry_of(&at::CUDAHooksInterface::isBuilt); }
void** context() { return entry_of(&at::CUDAHooksInterface::hasPrimaryContext); }
auto& guard() { return impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)]; }

struct {
  const impl::DeviceGuardImplInterface* guard;
  void *built, *context;
} before;

} // namespace

extern "C" void install() {
  static const Guard ours;
  before = {
      guard().exchange(&ours),
      exchange(built(), reinterpret_cast<void*>(is_built)),
      exchange(context(), reinterpret_cast<void*>(has_primary_context))};
}

extern "C" void restore() {
  exchange(context(), before.context);
  exchange(built(), before.built);
  guard().store(before.guard);
}
