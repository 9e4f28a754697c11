// What torch asks of a device before it indexes: for CUDA, which a torch built for CPUs lacks. One device, always
// current, on which nothing ever runs: tensors on it are shapes only (FakeTensorMode).
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
struct NoOpGuard final : public c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Device getDevice() const override { return c10::Device(c10::DeviceType::CUDA, 0); }
  c10::DeviceIndex deviceCount() const noexcept override { return 0; }
};
C10_REGISTER_GUARD_IMPL(CUDA, NoOpGuard);
}  // namespace
