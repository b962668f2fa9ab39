// The only file that includes torch's headers; tensor.h says why. It is compiled once, for all extensions.
#include "tensor.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd_ops.h>
#include <ATen/ops/linear_ops.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>
#include <torch/library.h>
#if __has_include(<torch/csrc/shim_exception_state.h>)  // torch 2.13 has it
#include <torch/csrc/shim_exception_state.h>
#define YOKE_KNOWS_ERRORS
#endif

#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace yoke {

// The results of an operator.
struct Made {
  c10::IValue values[2];
  std::size_t count = 0;
};

// Converts between torch's tensors and ours.
struct Bridge {
  static void view(const at::Tensor& from, Tensor& to) {
    to.impl_ = from.unsafeGetTensorImpl();
    to.data_ = const_cast<void*>(from.const_data_ptr());
    to.sizes_ = from.sizes().data();
    to.strides_ = from.strides().data();
    to.dim_ = from.dim();
    to.numel_ = from.numel();
    to.item_ = static_cast<std::int64_t>(from.element_size());
    to.type_ = static_cast<Scalar>(from.scalar_type());
    to.contiguous_ = from.is_contiguous();
  }
  static Tensor owned(at::Tensor&& from) {
    Tensor to;
    view(from, to);
    to.data_ = from.mutable_data_ptr();
    to.owned_ = true;
    from.unsafeReleaseTensorImpl();
    return to;
  }
  static at::Tensor of(const Tensor& from) {
    if (!from.defined()) return {};
    return at::Tensor(c10::intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl>::unsafe_reclaim_from_nonowning(
        static_cast<at::TensorImpl*>(from.impl_)));
  }
  static at::Tensor taken(Tensor&& from) {
    if (!from.owned_) return of(from);
    from.owned_ = false;
    return at::Tensor(c10::intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl>::reclaim(
        static_cast<at::TensorImpl*>(from.impl_)));
  }
  static void fill(const c10::IValue& from, Value& to) {
    if (from.isTensor()) {
      const at::Tensor& tensor = from.toTensor();
      if (tensor.defined()) view(tensor, to.tensor);
    } else if (from.isInt()) {
      to.integer = from.toInt();
    } else if (from.isBool()) {
      to.integer = from.toBool();
    } else if (from.isDouble()) {
      to.number = from.toDouble();
    } else if (from.isString()) {
      to.text = &from.toStringRef();
    } else if (!from.isNone()) {
      to.list = from.toIntVector();
    }
  }
  static Results results(Made& made) { return Results(&made); }
  static void add(const Results& results, c10::IValue&& value) {
    Made& made = *static_cast<Made*>(results.made_);
    made.values[made.count++] = std::move(value);
  }
};

std::string name_of(Scalar type) { return c10::toString(static_cast<at::ScalarType>(type)); }

bool Tensor::is_alias_of(const Tensor& other) const { return Bridge::of(*this).is_alias_of(Bridge::of(other)); }
void Tensor::copy_(const Tensor& from) const { Bridge::of(*this).copy_(Bridge::of(from)); }
Tensor Tensor::to(Scalar type) const { return Bridge::owned(Bridge::of(*this).to(static_cast<at::ScalarType>(type))); }
Tensor Tensor::in_order() const { return Bridge::owned(Bridge::of(*this).contiguous()); }
void* Tensor::writable() const { return Bridge::of(*this).mutable_data_ptr(); }
void Tensor::release() { Bridge::taken(std::move(*this)); }

Tensor empty(Sizes sizes, Scalar type) {
  return Bridge::owned(at::detail::empty_cpu(at::IntArrayRef(sizes.data, sizes.count), static_cast<at::ScalarType>(type)));
}

Tensor zeros(Sizes sizes, Scalar type) {
  Tensor made = empty(sizes, type);
  if (made.nbytes() != 0) std::memset(made.mutable_data_ptr(), 0, made.nbytes());
  return made;
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  std::optional<at::Tensor> own_bias;
  if (bias.has_value()) own_bias = Bridge::of(*bias);
  return Bridge::owned(at::_ops::linear::call(Bridge::of(x), Bridge::of(weight), own_bias).contiguous());
}

Tensor pad_last(const Tensor& x, std::int64_t zeros) {
  const c10::SymInt pad[] = {0, zeros};
  return Bridge::owned(at::_ops::constant_pad_nd::call(Bridge::of(x), c10::SymIntArrayRef(pad, 2), 0).contiguous());
}

std::int64_t num_threads() { return at::get_num_threads(); }

void run_parallel(std::int64_t begin, std::int64_t end, std::int64_t grain, const void* closure, Body body) {
  at::parallel_for(begin, end, grain,
                   [&](std::int64_t first, std::int64_t last) { body(closure, first, last); });
}

std::string last_error_of_compiled_code() {
#ifdef YOKE_KNOWS_ERRORS
  return torch::csrc::shim::details::get_torch_exception_what_without_backtrace();
#else
  return {};
#endif
}

void Results::add(Tensor&& value) { Bridge::add(*this, Bridge::taken(std::move(value))); }
void Results::add(bool value) { Bridge::add(*this, value); }
void Results::add(std::int64_t value) { Bridge::add(*this, value); }
void Results::add(double value) { Bridge::add(*this, value); }
void Results::add(const std::string& value) { Bridge::add(*this, value); }
void Results::add(const std::vector<std::string>& values) {
  Bridge::add(*this, c10::List<std::string>(c10::ArrayRef<std::string>(values)));
}

namespace {

// torch calls operators with a stack of typed values.
struct Boxed : c10::OperatorKernel {
  Operator called;
  explicit Boxed(const Operator& called) : called(called) {}

  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) {
    constexpr std::size_t kMost = 20;
    Value arguments[kMost];
    const std::size_t first = stack->size() - called.count;
    for (std::size_t i = 0; i < called.count; ++i) Bridge::fill((*stack)[first + i], arguments[i]);
    Made made;
    Results results = Bridge::results(made);
    try {
      called.run(arguments, results);
    } catch (const c10::Error&) {
      throw;
    } catch (const std::invalid_argument& error) {
      TORCH_CHECK_VALUE(false, error.what());
    } catch (const std::runtime_error& error) {
      TORCH_CHECK(false, error.what());
    }
    stack->resize(first);
    for (std::size_t i = 0; i < made.count; ++i) stack->push_back(std::move(made.values[i]));
  }
};

torch::CppFunction boxed(const Operator& op) {
  return torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Boxed>(op));
}

}  // namespace

Operators::Operators(const char* library, std::initializer_list<Operator> on_cpu,
                     std::initializer_list<Operator> anywhere) {
  using torch::Library;
  // Never destroyed: operators may run while the process exits.
  auto* const known = new Library(Library::FRAGMENT, library, std::nullopt, __FILE__, __LINE__);
  auto* const cpu = new Library(Library::IMPL, library, c10::DispatchKey::CPU, __FILE__, __LINE__);
  for (const Operator& op : on_cpu) {
    known->def(op.schema);
    cpu->impl(std::string(op.schema, std::strchr(op.schema, '(')).c_str(), boxed(op));
  }
  for (const Operator& op : anywhere) known->def(op.schema, boxed(op));
}

namespace {

struct LoadedStep {
  explicit LoadedStep(const std::string& path) : runner(path, 1, /*run_single_threaded=*/true) {}

  torch::inductor::AOTIModelContainerRunnerCpu runner;
  std::vector<at::Tensor> tensors;
};

std::mutex steps_lock;
std::vector<std::unique_ptr<LoadedStep>>& steps() {
  // Never destroyed: a step may run while the process ends.
  static auto* const all = new std::vector<std::unique_ptr<LoadedStep>>;
  return *all;
}

std::int64_t load_step(const std::string& path, const std::vector<std::string>& names,
                       const std::vector<at::Tensor>& tensors) {
  TORCH_CHECK(names.size() == tensors.size(), names.size(), " names for ", tensors.size(), " tensors");
  std::unordered_map<std::string, const at::Tensor*> by_name;
  for (std::size_t i = 0; i < names.size(); ++i) by_name[names[i]] = &tensors[i];
  auto step = std::make_unique<LoadedStep>(path);
  std::unordered_map<std::string, at::Tensor> wanted;
  for (const auto& [constant, name] : step->runner.getConstantNamesToOriginalFQNs()) {
    const auto found = by_name.find(name);
    TORCH_CHECK(found != by_name.end(), "the compiled step ", path, " needs a tensor '", name, "' that the model lacks");
    wanted[constant] = *found->second;
    step->tensors.push_back(*found->second);
  }
  step->runner.update_constant_buffer(wanted, /*use_inactive=*/false, /*validate_full_updates=*/true,
                                      /*user_managed=*/true);
  const std::lock_guard<std::mutex> guard(steps_lock);
  steps().push_back(std::move(step));
  return static_cast<std::int64_t>(steps().size()) - 1;
}

at::Tensor run_step(std::int64_t number, const std::vector<at::Tensor>& inputs) {
  LoadedStep* step = nullptr;
  {
    const std::lock_guard<std::mutex> guard(steps_lock);
    TORCH_CHECK(number >= 0 && number < static_cast<std::int64_t>(steps().size()), "there is no step ", number);
    step = steps()[static_cast<std::size_t>(number)].get();
  }
  auto results = step->runner.run(inputs);
  TORCH_CHECK(results.size() == 1, "a step has one result, this one has ", results.size());
  return std::move(results[0]);
}

}  // namespace

CompiledSteps::CompiledSteps(const char* library) {
  auto* const known = new torch::Library(torch::Library::FRAGMENT, library, std::nullopt, __FILE__, __LINE__);
  known->def("load_step(str path, str[] names, Tensor[] tensors) -> int", &load_step);
  known->def("run_step(int step, Tensor[] inputs) -> Tensor", &run_step);
}

}  // namespace yoke
