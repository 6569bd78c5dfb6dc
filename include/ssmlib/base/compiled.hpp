#pragma once

/// @file
/// Header-only by default, compiled by choice: how a header tells `ssmlib::compiled` what to hold.
///
/// After its definitions, and in their namespace, a kernel header writes
///
///     SSMLIB_INSTANTIATE(gemm, void gemm<float>(view<const float, 2>, ...));
///
/// where `gemm` is a family of the list in cmake/compiled.cmake, in which the header has a row.
/// Header-only builds ignore the line; with SSMLIB_COMPILED it is an `extern template`, and in the
/// library's own generated file for that family it is the definition.
///
/// Functions that are no templates stand in NAME_impl.hpp, each marked SSMLIB_INLINE, with a row
/// for NAME in the list. Their header includes that file at its end `#ifndef SSMLIB_COMPILED`;
/// otherwise the generated file alone does.

#if defined(SSMLIB_COMPILED)

#if defined(__AVX512F__)
#define SSMLIB_DETAIL_ISA avx512
#elif defined(__AVX2__) && defined(__FMA__)
#define SSMLIB_DETAIL_ISA avx2
#elif defined(__AVX__)
#define SSMLIB_DETAIL_ISA avx
#else
#define SSMLIB_DETAIL_ISA baseline
#endif
#if defined(SSMLIB_BLAS)
#define SSMLIB_DETAIL_PRODUCTS blas
#else
#define SSMLIB_DETAIL_PRODUCTS own
#endif

// The name of this symbol spells the options that change what the kernels are. The library defines
// it, every user refers to it: different options are a link error that says where to read.
#define SSMLIB_DETAIL_JOIN(isa, products) \
  ssmlib_mixed_build_flags__see_docs_build_md__##isa##_##products
#define SSMLIB_DETAIL_EXPAND(isa, products) SSMLIB_DETAIL_JOIN(isa, products)
#define SSMLIB_DETAIL_BUILD_FLAGS SSMLIB_DETAIL_EXPAND(SSMLIB_DETAIL_ISA, SSMLIB_DETAIL_PRODUCTS)

extern "C" {
extern const char SSMLIB_DETAIL_BUILD_FLAGS;
}
namespace ssm::detail {
[[gnu::used]] static const char* const build_flags = &SSMLIB_DETAIL_BUILD_FLAGS;
}

// SSMLIB_DEFINE_<family> is `, template` in that family's generated file, which moves `template`
// into the second place; elsewhere it is a plain name, and `extern template` stands there.
#define SSMLIB_DETAIL_SECOND(first, second, ...) second
#define SSMLIB_DETAIL_KIND(...) SSMLIB_DETAIL_SECOND(__VA_ARGS__, extern template, )
#define SSMLIB_INSTANTIATE(family, ...) SSMLIB_DETAIL_KIND(SSMLIB_DEFINE_##family) __VA_ARGS__
#define SSMLIB_INLINE

#else

#define SSMLIB_INSTANTIATE(family, ...) static_assert(true)
#define SSMLIB_INLINE inline

#endif
