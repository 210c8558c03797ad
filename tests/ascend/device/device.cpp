// A torch device named npu whose memory is the host's. It stands in for torch_npu where there is no
// card: the same dispatcher, refusal of mixed devices, of FP8 and of every operator that torch_npu
// lists no kernel for. Vendor operators are registered over it from Python.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <cstring>
#include <set>
#include <string>

namespace {

constexpr auto NPU = c10::DeviceType::PrivateUse1;
std::set<std::string> allowed;  // base names of operators with an NPU kernel; empty: all
std::set<std::string> used;
int64_t allocated = 0;

struct Allocator final : c10::Allocator {
  static void release(void* block) {
    auto* start = static_cast<char*>(block) - 64;
    allocated -= *reinterpret_cast<int64_t*>(start);
    c10::free_cpu(start);
  }
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(NPU, 0);
    if (bytes == 0) return {nullptr, nullptr, &release, device};
    auto* start = static_cast<char*>(c10::alloc_cpu(bytes + 64));
    *reinterpret_cast<int64_t*>(start) = static_cast<int64_t>(bytes);
    allocated += static_cast<int64_t>(bytes);
    return {start + 64, start + 64, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
Allocator allocator;
REGISTER_ALLOCATOR(NPU, &allocator);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return NPU; }
  c10::Device exchangeDevice(c10::Device) const override { return c10::Device(NPU, 0); }
  c10::Device getDevice() const override { return c10::Device(NPU, 0); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device d) const override {
    return c10::Stream(c10::Stream::DEFAULT, d);
  }
  c10::Stream getNewStream(c10::Device d, int) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** e, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    static int marker;
    *e = &marker;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    at::native::resize_bytes_nocuda(s, n);
  }
};
const bool hooked = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

// The same bytes as a CPU tensor; the storage lives as long as the view.
at::Tensor host_view(const at::Tensor& t) {
  if (!t.defined() || t.device().type() != NPU) return t;
  auto storage = t.storage();
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [storage](void*) {},
                       at::TensorOptions().dtype(t.scalar_type()).device(at::kCPU));
}

at::Tensor to_device(const at::Tensor& t) {
  if (!t.defined()) return t;
  const auto options = t.options().device(c10::Device(NPU, 0));
  at::Tensor out = t.is_non_overlapping_and_dense()
                       ? at::empty_strided(t.sizes(), t.strides(), options)
                       : at::empty(t.sizes(), options);
  host_view(out).copy_(t);
  return out;
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}
at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}
at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool) {
  host_view(target).copy_(host_view(source));
  return target;
}
at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  target.resize_(source.sizes());
  host_view(target).copy_(host_view(source));
  return target;
}
at::Scalar local_scalar(const at::Tensor& t) { return host_view(t).item(); }
at::Tensor as_strided(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(t, size, stride, offset);
}
at::Tensor view(const at::Tensor& t, c10::SymIntArrayRef size) {
  return at::cpu::view_symint(t, size);
}
at::Tensor reshape_alias(const at::Tensor& t, c10::SymIntArrayRef size,
                         c10::SymIntArrayRef stride) {
  return at::cpu::_reshape_alias_symint(t, size, stride);
}
at::Tensor& set_storage(at::Tensor& t, at::Storage s, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  return at::cpu::set_(t, s, offset, size, stride);
}
const at::Tensor& resize(const at::Tensor& t, c10::SymIntArrayRef size,
                         std::optional<at::MemoryFormat> format) {
  return at::native::resize_(t, C10_AS_INTARRAYREF_SLOW(size), format);
}

// What an operator was given: refused unless all of it lies on one device and can be computed.
struct Seen {
  bool device = false, host = false;
  void operator()(const at::Tensor& t) {
    if (!t.defined()) return;
    if (t.device().type() == NPU) {
      device = true;
      TORCH_CHECK(t.scalar_type() != at::kFloat8_e4m3fn && t.scalar_type() != at::kFloat8_e5m2,
                  "the 910B has no FP8 arithmetic");
    } else if (t.dim() > 0) {
      host = true;
    }
  }
};

c10::IValue host_value(const c10::IValue& v, Seen& seen) {
  if (v.isTensor()) {
    seen(v.toTensor());
    return host_view(v.toTensor());
  }
  if (v.isTensorList()) {
    c10::List<at::Tensor> out;
    for (const at::Tensor& t : v.toTensorVector()) seen(t), out.push_back(host_view(t));
    return out;
  }
  if (v.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> out;
    for (const auto& t : v.toOptionalTensorVector()) {
      if (t) seen(*t);
      out.push_back(t ? std::make_optional(host_view(*t)) : std::nullopt);
    }
    return out;
  }
  if (v.isDevice() && v.toDevice().type() == NPU) return c10::Device(at::kCPU);
  return v;
}

// Runs an operator of torch's own on the host's memory: in place where it writes, else copied out.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.operator_name().name;
  const std::string base = name.substr(name.find("::") + 2);
  TORCH_CHECK(name.rfind("aten::", 0) == 0 && (allowed.empty() || allowed.count(base)),
              name, ": torch_npu lists no NPU kernel of this name");
  const std::string overload = schema.operator_name().overload_name;
  used.insert(overload.empty() ? base : base + "." + overload);
  const auto count = schema.arguments().size();
  const std::vector<c10::IValue> given(stack->end() - count, stack->end());
  torch::jit::drop(*stack, count);
  Seen seen;
  std::vector<c10::IValue> passed;
  for (size_t i = 0; i < count; ++i) {
    const auto& argument = schema.arguments()[i];
    const bool out = argument.is_out() && given[i].isTensor();
    c10::IValue v = host_value(given[i], seen);
    passed.push_back(out ? at::empty({0}, v.toTensor().options()) : v);
  }
  TORCH_CHECK(!(seen.device && seen.host), "Expected all tensors to be on the same device, but found"
              " at least two devices, npu:0 and cpu! (", name, ")");
  for (auto& v : passed) torch::jit::push(*stack, v);
  op.callBoxed(stack);
  const auto returns = schema.returns().size();
  for (size_t r = 0; r < returns; ++r) {
    c10::IValue& result = *(stack->end() - returns + r);
    const auto* alias = schema.returns()[r].alias_info();
    if (alias == nullptr) {
      if (result.isTensor()) result = to_device(result.toTensor());
      if (result.isTensorList()) {
        c10::List<at::Tensor> moved;
        for (const at::Tensor& t : result.toTensorVector()) moved.push_back(to_device(t));
        result = moved;
      }
      continue;
    }
    TORCH_CHECK(alias->isWrite(), name, " gives a view, which this device has no kernel for");
    for (size_t i = 0; i < count; ++i) {
      const auto* own = schema.arguments()[i].alias_info();
      if (own == nullptr || !own->isWrite() || own->beforeSets() != alias->beforeSets()) continue;
      if (schema.arguments()[i].is_out()) copy_from_and_resize(passed[i].toTensor(), given[i].toTensor());
      result = given[i];
    }
  }
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  // torch would take this one apart; the vendor has it whole.
  m.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

void allow(const std::vector<std::string>& names) {
  allowed = std::set<std::string>(names.begin(), names.end());
}
std::vector<std::string> operators_used() { return {used.begin(), used.end()}; }
int64_t allocated_bytes() { return allocated; }

TORCH_LIBRARY(npu_stand_in, m) {
  constexpr auto ANY = c10::DispatchKey::CompositeExplicitAutograd;
  m.def("host_view(Tensor t) -> Tensor", torch::dispatch(ANY, TORCH_FN(host_view)));
  m.def("to_device(Tensor t) -> Tensor", torch::dispatch(ANY, TORCH_FN(to_device)));
  m.def("allow(str[] names) -> ()", torch::dispatch(ANY, TORCH_FN(allow)));
  m.def("operators_used() -> str[]", torch::dispatch(ANY, TORCH_FN(operators_used)));
  m.def("allocated_bytes() -> int", torch::dispatch(ANY, TORCH_FN(allocated_bytes)));
}

}  // namespace
