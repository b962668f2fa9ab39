// The interface between operators and torch. torch's headers cost 10 to 25 s of compile time in every file that
// includes them, so only bridge.cpp does. It provides what is declared here: tensors as plain memory with sizes, torch's
// thread pool, a few of torch's operators, and the registration of our operators.
//
// An argument is a view of the caller's tensor and is valid during the call. A tensor that is created here is owned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace yoke {

// torch's numbers of these types.
enum class Scalar : std::int8_t { u8 = 0, i8 = 1, i32 = 3, i64 = 4, f16 = 5, f32 = 6, bf16 = 15 };
std::string name_of(Scalar type);

struct Sizes {
  const std::int64_t* data = nullptr;
  std::size_t count = 0;

  Sizes() = default;
  Sizes(const std::int64_t* data, std::size_t count) : data(data), count(count) {}
  Sizes(const std::vector<std::int64_t>& sizes) : data(sizes.data()), count(sizes.size()) {}

  const std::int64_t* begin() const { return data; }
  const std::int64_t* end() const { return data + count; }
  std::size_t size() const { return count; }
  bool empty() const { return count == 0; }
  std::int64_t operator[](std::size_t i) const { return data[i]; }
  Sizes first(std::size_t some) const { return {data, some}; }
  std::vector<std::int64_t> vec() const { return {begin(), end()}; }
  bool operator==(const Sizes& other) const {
    bool same = count == other.count;
    for (std::size_t i = 0; same && i < count; ++i) same = data[i] == other.data[i];
    return same;
  }
};

class Tensor {
 public:
  Tensor() = default;
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    if (this != &other) {
      free();
      if (other.defined()) set(other);
      impl_ = other.impl_;
      owned_ = other.owned_;
      other.impl_ = nullptr;
      other.owned_ = false;
    }
    return *this;
  }
  ~Tensor() { free(); }

  bool defined() const { return impl_ != nullptr; }
  Scalar scalar_type() const { return type_; }
  Sizes sizes() const { return {sizes_, static_cast<std::size_t>(dim_)}; }
  std::int64_t dim() const { return dim_; }
  std::int64_t size(std::int64_t i) const { return sizes_[i < 0 ? i + dim_ : i]; }
  std::int64_t stride(std::int64_t i) const { return strides_[i < 0 ? i + dim_ : i]; }
  std::int64_t numel() const { return numel_; }
  std::int64_t element_size() const { return item_; }
  std::size_t nbytes() const { return static_cast<std::size_t>(numel_ * item_); }
  bool is_contiguous() const { return contiguous_; }
  bool is_same(const Tensor& other) const { return impl_ == other.impl_; }
  bool is_alias_of(const Tensor& other) const;

  // T is the type of the elements, or an integer of the same size; this is not checked.
  template <typename T = void>
  const T* const_data_ptr() const {
    return static_cast<const T*>(data_);
  }
  template <typename T = void>
  T* mutable_data_ptr() const {
    return static_cast<T*>(owned_ ? data_ : writable());
  }

  // A view of this tensor, as an argument is; it does not keep the tensor alive.
  Tensor view() const {
    Tensor same;
    if (defined()) same.set(*this);
    return same;
  }
  // The same elements, contiguous: a view of this tensor if it is contiguous already.
  Tensor contiguous() const& { return contiguous_ ? view() : in_order(); }
  Tensor contiguous() && { return contiguous_ ? std::move(*this) : in_order(); }
  void copy_(const Tensor& from) const;
  Tensor to(Scalar type) const;

 private:
  friend struct Bridge;

  void set(const Tensor& other) {
    impl_ = other.impl_;
    data_ = other.data_;
    sizes_ = other.sizes_;
    strides_ = other.strides_;
    dim_ = other.dim_;
    numel_ = other.numel_;
    item_ = other.item_;
    type_ = other.type_;
    contiguous_ = other.contiguous_;
  }
  void free() {
    if (owned_) release();
  }
  void release();
  void* writable() const;
  Tensor in_order() const;

  void* impl_ = nullptr;  // torch's tensor
  void* data_;
  const std::int64_t *sizes_, *strides_;
  std::int64_t dim_, numel_, item_;
  Scalar type_;
  bool contiguous_;
  bool owned_ = false;
};

// An optional argument.
class OptionalTensor {
 public:
  OptionalTensor(const Tensor& tensor) : tensor_(&tensor) {}
  bool has_value() const { return tensor_->defined(); }
  const Tensor& operator*() const { return *tensor_; }
  const Tensor* operator->() const { return tensor_; }

 private:
  const Tensor* tensor_;
};

Tensor empty(Sizes sizes, Scalar type);
Tensor zeros(Sizes sizes, Scalar type);
inline Tensor empty(std::initializer_list<std::int64_t> sizes, Scalar type) {
  return empty(Sizes(sizes.begin(), sizes.size()), type);
}

// torch's own operators.
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);
Tensor pad_last(const Tensor& x, std::int64_t zeros);
std::int64_t num_threads();
std::string last_error_of_compiled_code();

using Body = void (*)(const void* closure, std::int64_t first, std::int64_t last);
void run_parallel(std::int64_t begin, std::int64_t end, std::int64_t grain, const void* closure, Body body);

// Calls body(first, last) for parts of [begin, end) of at least `grain`, on the threads of torch's pool.
template <typename F>
void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain, const F& body) {
  run_parallel(begin, end, grain, &body, [](const void* closure, std::int64_t first, std::int64_t last) {
    (*static_cast<const F*>(closure))(first, last);
  });
}

// Builds an error message from text and values.
inline void put(std::string& to, const char* text) { to += text; }
inline void put(std::string& to, const std::string& text) { to += text; }
inline void put(std::string& to, Scalar type) { to += name_of(type); }
template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
void put(std::string& to, T number) {
  to += std::to_string(number);
}
inline void put(std::string& to, Sizes sizes) {
  to += '[';
  for (std::size_t i = 0; i < sizes.count; ++i) to += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  to += ']';
}
template <typename... Parts>
std::string message(const Parts&... parts) {
  std::string text;
  (put(text, parts), ...);
  return text;
}

// They raise RuntimeError and ValueError in Python.
#define YOKE_CHECK(holds, ...)                                                           \
  do {                                                                                   \
    if (!(holds)) [[unlikely]] throw std::runtime_error(::yoke::message(__VA_ARGS__));    \
  } while (false)
#define YOKE_CHECK_VALUE(holds, ...)                                                     \
  do {                                                                                   \
    if (!(holds)) [[unlikely]] throw std::invalid_argument(::yoke::message(__VA_ARGS__)); \
  } while (false)

// One argument of an operator, or its result.
struct Value {
  Tensor tensor;  // undefined for an optional argument that was not given
  std::int64_t integer;
  double number;
  const std::string* text;
  std::vector<std::int64_t> list;

  template <typename T>
  decltype(auto) as() const {
    using Plain = std::remove_cvref_t<T>;
    if constexpr (std::is_same_v<Plain, Tensor>) {
      return (tensor);
    } else if constexpr (std::is_same_v<Plain, OptionalTensor>) {
      return OptionalTensor(tensor);
    } else if constexpr (std::is_same_v<Plain, double>) {
      return number;
    } else if constexpr (std::is_same_v<Plain, bool>) {
      return integer != 0;
    } else if constexpr (std::is_same_v<Plain, std::string>) {
      return (*text);
    } else if constexpr (std::is_same_v<Plain, Sizes>) {
      return Sizes(list);
    } else {
      static_assert(std::is_same_v<Plain, std::int64_t>);
      return integer;
    }
  }
};

class Results {
 public:
  void add(Tensor&& value);
  void add(bool value);
  void add(std::int64_t value);
  void add(double value);
  void add(const std::string& value);
  void add(const std::vector<std::string>& values);
  void add(std::tuple<Tensor, Tensor>&& values) {
    add(std::get<0>(std::move(values)));
    add(std::get<1>(std::move(values)));
  }

 private:
  friend struct Bridge;
  explicit Results(void* made) : made_(made) {}
  void* made_;
};

struct Operator {
  const char* schema;
  std::size_t count;  // number of arguments
  void (*run)(const Value* arguments, Results& results);
};

template <auto function>
struct Called;

template <typename R, typename... A, R (*function)(A...)>
struct Called<function> {
  static constexpr std::size_t count = sizeof...(A);

  static void run(const Value* arguments, Results& results) { run(arguments, results, std::index_sequence_for<A...>{}); }

 private:
  template <std::size_t... i>
  static void run(const Value* arguments, Results& results, std::index_sequence<i...>) {
    if constexpr (std::is_void_v<R>) {
      function(arguments[i].as<A>()...);
    } else {
      results.add(function(arguments[i].as<A>()...));
    }
  }
};

template <auto function>
Operator op(const char* schema) {
  return {schema, Called<function>::count, Called<function>::run};
}

// A static object of this class registers operators of torch.ops.<library> while the shared object is loaded.
struct Operators {
  Operators(const char* library, std::initializer_list<Operator> on_cpu, std::initializer_list<Operator> anywhere = {});
};

// The same for models' steps that torch has compiled ahead of time (a shared object with a JSON file beside it):
//   load_step(str path, str[] names, Tensor[] tensors) -> int: `tensors` are the model's, by name. They are used where
//     they are, and kept alive for as long as the process runs.
//   run_step(int step, Tensor[] inputs) -> Tensor: a step with one result.
struct CompiledSteps {
  explicit CompiledSteps(const char* library);
};

}  // namespace yoke
