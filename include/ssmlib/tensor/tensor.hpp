#pragma once

#include <ssmlib/backend/backend.hpp>
#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/backend/cpu_memory.hpp>
#include <ssmlib/tensor/shape.hpp>
#include <ssmlib/tensor/view.hpp>

#include <algorithm>
#include <atomic>
#include <concepts>
#include <cstring>
#include <span>
#include <utility>

namespace ssm {

namespace detail {
// What tensors of all types and ranks share, in tensor_impl.hpp. Axes are missing on the left.
struct strided_axes {
  shape<4> extents{1, 1, 1, 1}, strides{};

  [[nodiscard]] bool are_dense() const {
    index_t step = 1;
    for (std::size_t d = 4; d-- > 0;) {
      if (extents[d] != 1 && strides[d] != step) return false;
      step *= extents[d];
    }
    return true;
  }
};
/// Elements of a tensor, whatever they are.
struct memory_part {
  const void* data;
  strided_axes axes;
  std::size_t element_bytes;
};
/// How a backend works on elements without knowing what they mean:
///
///   copy(to, axes, from, axes, element_bytes), fill(to, axes, value, element_bytes)
///   add(to, axes, from, axes)               to += from, for f32, f64 and, where it computes, bf16
///   zero(buffer)                            all bits; a backend may put it off, see tensor::data()
///   from_host(tensor<T, R, cpu>)            a tensor of the backend with these elements
///   to_host(tensor<T, R, B>)                and back, when all work before it is done
///
/// and, where zero() is put off until it is known what is overwritten,
///
///   settle(buffer, part)                    before a part is read or added to
///   is_unwritten(buffer, part), mark_written(buffer, part)
template <class B>
struct elements;
template <>
struct elements<cpu> {
  static void copy(void* to, const strided_axes& to_axes, const void* from,
                   const strided_axes& from_axes, std::size_t element_bytes);
  static void fill(void* to, const strided_axes& axes, const void* value,
                   std::size_t element_bytes);
  template <class T>
  static void add(T* to, const strided_axes& to_axes, const T* from,
                  const strided_axes& from_axes) {
    const shape<4>&n = to_axes.extents, &sa = to_axes.strides, &sb = from_axes.strides;
    for (index_t i = 0; i < n[0]; ++i) {
      for (index_t j = 0; j < n[1]; ++j) {
        for (index_t k = 0; k < n[2]; ++k) {
          T* a = to + i * sa[0] + j * sa[1] + k * sa[2];
          const T* b = from + i * sb[0] + j * sb[1] + k * sb[2];
          for (index_t l = 0; l < n[3]; ++l)
            a[l * sa[3]] += b[l * sb[3]];
        }
      }
    }
  }
  template <class Buffer>
  static void zero(const Buffer& b) {
    std::memset(b.data(), 0, b.bytes());
  }
  template <class Tensor>
  static const Tensor& from_host(const Tensor& t) {
    return t;
  }
  template <class Tensor>
  static const Tensor& to_host(const Tensor& t) {
    return t;
  }
};
/// Strides of `extents` over the memory of (old_extents, old_strides), or false.
[[nodiscard]] bool reshaped_strides(std::span<const index_t> old_extents,
                                    std::span<const index_t> old_strides,
                                    std::span<const index_t> extents, std::span<index_t> strides);
void check_extents(std::span<const index_t> extents);
void check_copy(std::span<const index_t> from, std::span<const index_t> to);
[[noreturn]] void throw_slice(int axis, index_t begin, index_t end,
                              std::span<const index_t> extents);
[[noreturn]] void throw_reshape(std::span<const index_t> from, std::span<const index_t> to,
                                bool same_count);
}  // namespace detail

/// A counted block of memory from the backend's pool. Its address is its identity: the tape keys
/// gradients by it, and assignment detects aliasing by it.
template <Backend B>
class buffer {
 public:
  using resource = typename B::memory_resource;
  using block = typename resource::block;

  buffer() = default;
  explicit buffer(std::size_t bytes) : block_(resource::create(bytes)) {}
  buffer(const buffer& other) noexcept : block_(other.block_) {
    if (block_) block_->count.fetch_add(1, std::memory_order_relaxed);
  }
  buffer(buffer&& other) noexcept : block_(std::exchange(other.block_, nullptr)) {}
  buffer& operator=(buffer other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~buffer() {
    if (block_ && block_->count.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      resource::destroy(block_);
    }
  }

  [[nodiscard]] void* data() const { return block_ ? block_->data : nullptr; }
  [[nodiscard]] std::size_t bytes() const { return block_ ? block_->bytes : 0; }
  [[nodiscard]] const void* id() const { return block_; }
  /// For the backend, which may keep more there.
  [[nodiscard]] block* head() const { return block_; }
  [[nodiscard]] index_t use_count() const {
    return block_ ? block_->count.load(std::memory_order_relaxed) : 0;
  }

 private:
  block* block_ = nullptr;
};

/// A tensor of rank 1 to 4, stored (batch, time, head, feature), last index fastest, possibly a
/// strided part of a larger one.
///
/// It owns its elements by count: copying a tensor shares them (one atomic increment), slicing and
/// reshaping share them too, `clone()` copies them. Expression nodes hold tensors by value, so no
/// node can outlive what it reads. A default tensor holds nothing; nodes use it as "absent".
template <Element T, int Rank, Backend B = cpu>
class tensor {
  static_assert(Rank >= 1 && Rank <= 4, "ssm: tensors have rank 1 to 4; merge axes with reshape");

 public:
  using value_type = T;
  using backend = B;
  static constexpr int rank = Rank;

  tensor() = default;
  tensor(const tensor&) = default;
  /// What is moved from holds nothing, as a default tensor.
  tensor(tensor&& other) noexcept
      : buffer_(std::move(other.buffer_)),
        data_(std::exchange(other.data_, nullptr)),
        extents_(std::exchange(other.extents_, {})),
        strides_(std::exchange(other.strides_, {})) {}
  tensor& operator=(tensor other) noexcept {
    std::swap(buffer_, other.buffer_);
    std::swap(data_, other.data_);
    std::swap(extents_, other.extents_);
    std::swap(strides_, other.strides_);
    return *this;
  }
  ~tensor() = default;

  /// Uninitialised elements. @throws shape_error  a negative extent.
  explicit tensor(const shape<Rank>& extents)
      : extents_(extents), strides_(dense_strides(extents)) {
    detail::check_extents(extents);
    buffer_ = buffer<B>(static_cast<std::size_t>(element_count(extents)) * sizeof(T));
    data_ = static_cast<T*>(buffer_.data());
  }
  template <class... I>
  requires(sizeof...(I) == Rank &&
           (std::convertible_to<I, index_t> && ...)) explicit tensor(I... extents)
      : tensor(shape<Rank>{static_cast<index_t>(extents)...}) {}

  [[nodiscard]] static tensor full(const shape<Rank>& extents, T value) {
    tensor t(extents);
    t.fill(value);
    return t;
  }
  [[nodiscard]] static tensor zeros(const shape<Rank>& extents) { return full(extents, T(0.0f)); }
  template <class... I>
  requires(sizeof...(I) == Rank && (std::convertible_to<I, index_t> && ...))
      [[nodiscard]] static tensor zeros(I... extents) {
    return zeros(shape<Rank>{static_cast<index_t>(extents)...});
  }

  [[nodiscard]] const shape<Rank>& extents() const { return extents_; }
  [[nodiscard]] const shape<Rank>& strides() const { return strides_; }
  [[nodiscard]] index_t extent(int d) const { return extents_[static_cast<std::size_t>(d)]; }
  [[nodiscard]] index_t size() const { return data_ ? element_count(extents_) : 0; }
  /// Where the elements are, to read and to write. On a backend that puts off filling with zeros it
  /// is done now, unless this part has been written.
  [[nodiscard]] T* data() const {
    if constexpr (puts_off_zeros) detail::elements<B>::settle(buffer_, part());
    return data_;
  }
  [[nodiscard]] const buffer<B>& storage() const { return buffer_; }
  /// False for a default tensor, which holds nothing.
  explicit operator bool() const { return data_ != nullptr; }

  [[nodiscard]] ssm::view<T, Rank> view() const { return {data(), extents_, strides_}; }
  [[nodiscard]] ssm::view<const T, Rank> const_view() const { return {data(), extents_, strides_}; }

  /// Whether all elements are zeros that nobody has stored: then what is to be added to them can be
  /// stored instead, after mark_written(). False where that is not known.
  [[nodiscard]] bool is_unwritten() const {
    if constexpr (puts_off_zeros) return detail::elements<B>::is_unwritten(buffer_, part());
    return false;
  }
  /// The caller overwrites every element before anybody reads one.
  void mark_written() const {
    if constexpr (puts_off_zeros) detail::elements<B>::mark_written(buffer_, part());
  }

  /// Unchecked element access; the CPU only.
  template <class... I>
  requires(sizeof...(I) == Rank) T& operator()(I... i) const {
    return ssm::view<T, Rank>{data_, extents_, strides_}(i...);
  }

  [[nodiscard]] bool is_contiguous() const { return axes().are_dense(); }

  /// A deep copy with dense strides.
  [[nodiscard]] tensor clone() const {
    if (!data_) return {};
    tensor out(extents_);
    out.copy_from(*this);
    return out;
  }
  /// This tensor when it is dense, else a dense copy.
  [[nodiscard]] tensor contiguous() const { return is_contiguous() ? *this : clone(); }

  /// Copies elements. @throws shape_error  the shapes differ.
  void copy_from(const tensor& other) const {
    detail::check_copy(other.extents_, extents_);
    if (size() == 0) return;
    const T* from = other.data();
    mark_written();
    detail::elements<B>::copy(data(), axes(), from, other.axes(), sizeof(T));
  }
  void fill(T value) const {
    if (size() == 0) return;
    mark_written();
    detail::elements<B>::fill(data(), axes(), &value, sizeof(T));
  }

  /// The part [begin, end) of axis d, sharing the elements. @throws shape_error  out of range.
  [[nodiscard]] tensor slice(int d, index_t begin, index_t end) const {
    if (d < 0 || d >= Rank || begin < 0 || end < begin || end > extent(d)) {
      detail::throw_slice(d, begin, end, extents_);
    }
    tensor out = *this;
    out.extents_[static_cast<std::size_t>(d)] = end - begin;
    if (data_) out.data_ = data_ + begin * strides_[static_cast<std::size_t>(d)];
    return out;
  }

  /// The same elements under other extents, shared. Axes may be merged or split wherever their
  /// strides allow it: the parts of a projection, (b, T, H*P), become (b, T, H, P) without a copy.
  /// @throws shape_error  another number of elements, or strides that do not allow it (use
  ///                      contiguous() first).
  template <int R2>
  [[nodiscard]] tensor<T, R2, B> reshape(const shape<R2>& extents) const;
  template <class... I>
  requires(std::convertible_to<I, index_t>&&...) [[nodiscard]] auto reshape(I... extents) const {
    return reshape<static_cast<int>(sizeof...(I))>(
        shape<static_cast<int>(sizeof...(I))>{static_cast<index_t>(extents)...});
  }

  /// The tensor with the same geometry over another buffer: the gradient of a part is the same
  /// part of the gradient. @pre `other` is at least as large as this tensor's buffer.
  [[nodiscard]] tensor rebind(const buffer<B>& other) const {
    tensor out = *this;
    out.buffer_ = other;
    out.data_ = static_cast<T*>(other.data()) + (data_ - static_cast<T*>(buffer_.data()));
    return out;
  }

  /// Extents and strides with missing axes on the left.
  [[nodiscard]] detail::strided_axes axes() const {
    detail::strided_axes all;
    std::copy_n(extents_.begin(), Rank, all.extents.end() - Rank);
    std::copy_n(strides_.begin(), Rank, all.strides.end() - Rank);
    return all;
  }

  /// f(mine, theirs) for every pair of elements, in dense order; the CPU only. @pre equal shapes
  template <class F>
  void zip_with(const tensor& other, F f) const {
    const detail::strided_axes mine = axes(), theirs = other.axes();
    const shape<4>&n = mine.extents, &sa = mine.strides, &sb = theirs.strides;
    for (index_t i = 0; i < n[0]; ++i) {
      for (index_t j = 0; j < n[1]; ++j) {
        for (index_t k = 0; k < n[2]; ++k) {
          T* a = data_ + i * sa[0] + j * sa[1] + k * sa[2];
          const T* b = other.data_ + i * sb[0] + j * sb[1] + k * sb[2];
          for (index_t l = 0; l < n[3]; ++l)
            f(a[l * sa[3]], b[l * sb[3]]);
        }
      }
    }
  }

 private:
  template <Element, int, Backend>
  friend class tensor;

  static constexpr bool puts_off_zeros =
      requires(const buffer<B>& b, const detail::memory_part& part) {
    detail::elements<B>::settle(b, part);
  };
  [[nodiscard]] detail::memory_part part() const { return {data_, axes(), sizeof(T)}; }

  buffer<B> buffer_;
  T* data_ = nullptr;
  shape<Rank> extents_{};
  shape<Rank> strides_{};
};

template <Element T, int Rank, Backend B>
template <int R2>
tensor<T, R2, B> tensor<T, Rank, B>::reshape(const shape<R2>& extents) const {
  tensor<T, R2, B> out;
  out.buffer_ = buffer_;
  out.data_ = data_;
  out.extents_ = extents;
  const bool same_count = element_count(extents) == element_count(extents_);
  if (same_count && (is_contiguous() || element_count(extents) == 0)) {
    out.strides_ = dense_strides(extents);
    return out;
  }
  if (!same_count || !detail::reshaped_strides(extents_, strides_, extents, out.strides_)) {
    detail::throw_reshape(extents_, extents, same_count);
  }
  return out;
}

namespace detail {
/// to += from, element by element. @pre equal shapes
template <Element T, int R, Backend B>
void add_to(const tensor<T, R, B>& to, const tensor<T, R, B>& from) {
  if (to.size() == 0) return;
  if (to.is_unwritten()) return to.copy_from(from);
  elements<B>::add(to.data(), to.axes(), from.data(), from.axes());
}
/// A tensor of the backend with the elements of a host tensor; on the CPU the tensor itself.
template <Backend B, Element T, int R>
[[nodiscard]] tensor<T, R, B> on_backend(const tensor<T, R, cpu>& t) {
  return elements<B>::from_host(t);
}
/// The elements on the host; a CPU tensor is that already.
template <Element T, int R, Backend B>
[[nodiscard]] tensor<T, R, cpu> on_host(const tensor<T, R, B>& t) {
  return elements<B>::to_host(t);
}
}  // namespace detail

/// Whether two tensors share memory. By owner, so parts of one tensor always do.
template <class A, class C>
[[nodiscard]] bool share_storage(const A& a, const C& c) {
  return a.storage().id() != nullptr && a.storage().id() == c.storage().id();
}

/// Converts every element (through float where bf16 is involved).
template <Element To, Element From, int R>
[[nodiscard]] tensor<To, R, cpu> cast(const tensor<From, R, cpu>& from) {
  tensor<To, R, cpu> to(from.extents());
  const tensor<From, R, cpu> dense = from.contiguous();
  for (index_t i = 0; i < dense.size(); ++i) {
    if constexpr (std::same_as<From, bf16>) {
      to.data()[i] = To(float(dense.data()[i]));
    } else if constexpr (std::same_as<To, bf16>) {
      to.data()[i] = bf16(static_cast<float>(dense.data()[i]));
    } else {
      to.data()[i] = static_cast<To>(dense.data()[i]);
    }
  }
  return to;
}

}  // namespace ssm

#ifndef SSMLIB_COMPILED
#include <ssmlib/tensor/tensor_impl.hpp>
#endif
