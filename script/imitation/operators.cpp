// torch's operators on tensors of the imitated card, computed by its CPU kernels.
//
// Memory of the device is memory of the host, so a CUDA tensor and a CPU tensor can share it. Every
// operator that has a kernel for both kinds of device gets one for CUDA that calls the one for CPUs.
// What compilers and Triton make is refused by driver.c.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/copy_native.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <set>

using at::Tensor;
using c10::DispatchKey;
using c10::IValue;
using Stack = torch::jit::Stack;
using MaybeTensor = std::optional<Tensor>;

namespace {

Tensor on_cpu(const Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  auto* start = static_cast<char*>(t.storage().mutable_data()) + t.storage_offset() * t.itemsize();
  auto options = t.options().device(at::kCPU).requires_grad(false);
  return at::from_blob(start, t.sizes(), t.strides(), [](void*) {}, options);
}

Tensor on_card(const Tensor& t) {
  if (!t.defined() || t.is_cuda()) return t;
  auto found = at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kCUDA, 0));
  on_cpu(found).copy_(t);
  return found;
}

// Numbers of the CPU, which depend on the seed and on how often the card's generator was used.
at::Generator generator_on_cpu(at::Generator of_card) {
  auto used = of_card.get_offset();
  auto found = at::globalContext().defaultGenerator(at::kCPU).clone();
  found.set_current_seed(of_card.current_seed() * 1000003 + used);
  of_card.set_offset(used + 4);  // a multiple of 4, as torch insists
  return found;
}

IValue for_cpu(const IValue& value) {
  if (value.isTensor()) return on_cpu(value.toTensor());
  if (value.isDevice()) return c10::Device(at::kCPU);
  if (value.isGenerator()) {
    auto generator = value.toGenerator();
    bool card = generator.defined() && !generator.device().is_cpu();
    return card ? IValue(generator_on_cpu(generator)) : value;
  }
  if (!value.isList()) return value;
  auto list = value.toList();
  auto type = list.elementType()->kind();
  if (type != c10::TypeKind::TensorType && type != c10::TypeKind::OptionalType) return value;
  c10::impl::GenericList found(list.elementType());
  for (size_t i = 0; i < list.size(); i++) found.push_back(for_cpu(list.get(i)));
  return found;
}

bool written(const c10::Argument& argument) {
  return argument.alias_info() && argument.alias_info()->isWrite();
}

// An argument that is written. An empty one is resized, which shared memory cannot be.
IValue to_write(const IValue& value) {
  if (!value.isTensor() || !value.toTensor().defined() || value.toTensor().numel())
    return for_cpu(value);
  return at::empty(value.toTensor().sizes(), value.toTensor().options().device(at::kCPU));
}

Tensor what_was_written(const c10::Argument& result, const Tensor& value,
                        const c10::FunctionSchema& schema, const std::vector<IValue>& arguments) {
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto& argument = schema.arguments()[i];
    if (!written(argument) ||
        argument.alias_info()->afterSets() != result.alias_info()->afterSets())
      continue;
    Tensor found = arguments[i].toTensor();
    if (found.sizes() != value.sizes()) on_cpu(found.resize_(value.sizes())).copy_(value);
    return found;
  }
  TORCH_CHECK(false, "imitated card: ", schema.name(), " returns what it was not given");
}

void compute(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  std::vector<IValue> arguments(stack->end() - schema.arguments().size(), stack->end());
  torch::jit::drop(*stack, arguments.size());
  c10::cuda::getCurrentCUDAStream().query();  // makes the late copies of this stream
  Stack computed;
  for (size_t i = 0; i < arguments.size(); i++)
    computed.push_back(written(schema.arguments()[i]) ? to_write(arguments[i])
                                                      : for_cpu(arguments[i]));
  op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), &computed);
  for (size_t i = 0; i < schema.returns().size(); i++) {
    const auto& result = schema.returns()[i];
    if (written(result))
      stack->push_back(what_was_written(result, computed[i].toTensor(), schema, arguments));
    else if (computed[i].isTensor())
      stack->push_back(on_card(computed[i].toTensor()));
    else if (computed[i].isTensorList()) {
      c10::List<Tensor> found;
      for (const Tensor& t : computed[i].toTensorVector()) found.push_back(on_card(t));
      stack->push_back(found);
    } else
      stack->push_back(computed[i]);
  }
}

// --- operators that CPUs lack

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (!self.is_cuda() || !source.is_cuda()) return at::native::copy_(self, source, non_blocking);
  c10::cuda::getCurrentCUDAStream().query();
  on_cpu(self).copy_(on_cpu(source));
  return self;
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& bias,
                 bool causal, std::optional<double> scale) {
  c10::cuda::getCurrentCUDAStream().query();
  auto wide = [](const Tensor& t) { return on_cpu(t).to(at::kFloat); };
  auto mask = bias && bias->defined() ? MaybeTensor(wide(*bias)) : MaybeTensor();
  // Not by the choice among backends: a caller may have allowed one of the card's alone.
  auto [found, weights] = at::_scaled_dot_product_attention_math(wide(q), wide(k), wide(v), mask, 0.0,
                                                                 causal, {}, scale);
  auto rows = at::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options()).transpose(1, 2);
  on_cpu(rows).copy_(found);
  return rows;
}

Tensor nothing(const Tensor& like, at::ScalarType type) {
  return at::empty({0}, like.options().dtype(type));
}

using Attended = std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor,
                            Tensor>;

Attended cudnn(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& bias, bool,
               double, bool causal, bool, std::optional<double> scale) {
  return {attention(q, k, v, bias, causal, scale), nothing(q, at::kFloat), Tensor(), Tensor(),
          q.size(2), k.size(2), nothing(q, at::kLong), nothing(q, at::kLong), Tensor()};
}

Attended flash(const Tensor& q, const Tensor& k, const Tensor& v, double dropout, bool causal,
               bool mask, std::optional<double> scale) {
  return cudnn(q, k, v, {}, false, dropout, causal, mask, scale);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient(const Tensor& q, const Tensor& k,
                                                     const Tensor& v, const MaybeTensor& bias, bool,
                                                     double, bool causal,
                                                     std::optional<double> scale) {
  return {attention(q, k, v, bias, causal, scale), nothing(q, at::kFloat), nothing(q, at::kLong),
          nothing(q, at::kLong)};
}

Tensor convolution(const Tensor& x, const Tensor& weight, c10::SymIntArrayRef padding,
                   c10::SymIntArrayRef stride, c10::SymIntArrayRef dilation, c10::SymInt groups, bool,
                   bool, bool) {
  c10::cuda::getCurrentCUDAStream().query();
  std::vector<c10::SymInt> no_padding(padding.size(), 0);
  return on_card(at::convolution_symint(on_cpu(x), on_cpu(weight), {}, stride, padding, dilation,
                                        false, no_padding, groups));
}

// --- what is replaced

// Operators that are about memory itself, or that copy from the device as CUDA does.
const std::set<std::string> KEPT = {
    "aten::_local_scalar_dense", "aten::_pin_memory", "aten::_reshape_alias", "aten::as_strided",
    "aten::empty",               "aten::empty_strided", "aten::is_pinned",    "aten::is_set_to",
    "aten::record_stream",       "aten::resize_",     "aten::set_",           "aten::unfold",
    "aten::view"};

bool has_both(const c10::OperatorHandle& op) {
  if (!op.hasKernelForDispatchKey(DispatchKey::CUDA)) return false;
  for (const auto& result : op.schema().returns())
    if (result.alias_info() && !written(result)) return false;  // a view
  for (auto key : {DispatchKey::CPU, DispatchKey::CompositeExplicitAutograd,
                   DispatchKey::CompositeExplicitAutogradNonFunctional,
                   DispatchKey::CompositeImplicitAutograd})
    if (op.hasKernelForDispatchKey(key)) return true;
  return false;
}

struct Quiet : c10::WarningHandler {  // torch warns about every kernel that is replaced
  void process(const c10::Warning&) override {}
};

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  Quiet quiet;
  c10::WarningUtils::WarningHandlerGuard guard(&quiet);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findSchema(name);
    if (name.name.rfind("aten::", 0) || KEPT.count(name.name) || !op || !has_both(*op)) continue;
    auto full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&compute>());
  }
  library.impl("copy_", copy_);
  library.impl("_scaled_dot_product_flash_attention", flash);
  library.impl("_scaled_dot_product_cudnn_attention", cudnn);
  library.impl("_scaled_dot_product_efficient_attention", efficient);
  library.impl("cudnn_convolution", convolution);
}

}  // namespace
